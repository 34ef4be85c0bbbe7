//! What gets through, compared byte for byte, over links of several MTUs.
use super::super::*;
