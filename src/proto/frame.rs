//! Page frames and page requests: what the demand and push lanes carry.
//!
//! Both are fixed headers of 24 bytes, little-endian; a page frame's content follows
//! its header. Every header is checked against the guest's size, the link epoch and
//! the negotiated features before a byte of content is taken in.
//!
//! ```text
//! page frame     0      1      2        4         8            16        20
//!                kind   origin reserved epoch u32 first u64    count u32 length u32
//! page request   0                     8         12       14       16        20
//!                first u64             count u32 vcpu u16 zero u16 epoch u32 zero u32
//! ```

use super::ledger::Claim;
use super::page::{PAGE_SIZE, PageIndex, PageRun, RUN_PAGES_MAX};

/// Bytes of a page frame's header, and of a page request.
pub const HEADER_LEN: usize = 24;

/// How a frame's pages are carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PageKind {
    /// As they are.
    Raw = 0,
    /// Not at all: every byte is zero.
    Zero = 1,
    /// Not at all: nothing was ever written there. Reads as zero.
    Hole = 2,
    /// As an LZ4 block, see [`codec`](super::compression::codec): if the proposal says that
    /// there may be some, and of pushed pages only.
    Compressed = 3,
    /// Not at all: the source cannot read them. Whoever touches one gets a memory error.
    Poison = 4,
}

/// Why a page was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Origin {
    /// With the switchover: the vCPUs' first instructions need it.
    Seed = 0,
    /// In answer to a network fault.
    Demand = 1,
    /// By the pre-paging policy.
    Push = 2,
    /// By a policy's final drain.
    Drain = 3,
    /// Before the switchover, of a guest that may write to it again: it is not mapped
    /// before the source says which pages are valid.
    Copy = 4,
}

/// A checked header of a page frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// How the pages are carried.
    pub kind: PageKind,
    /// Why they were sent.
    pub origin: Origin,
    /// The link epoch they were sent in.
    pub epoch: u32,
    /// Which pages.
    pub run: PageRun,
    /// Bytes of content after the header.
    pub content_len: usize,
}

/// What a received header is checked against.
#[derive(Clone, Copy, Debug)]
pub struct FrameLimits {
    /// Pages of the guest.
    pub pages: u64,
    /// The current link epoch.
    pub epoch: u32,
    /// Whether pages may come compressed.
    pub compressed: bool,
}

/// A header that no honest peer of this version sends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// An unknown or not negotiated page kind.
    #[error("page frame of unknown or not negotiated kind {0}")]
    Kind(u8),
    /// An unknown origin.
    #[error("page frame of unknown origin {0}")]
    Origin(u8),
    /// Bits that must be zero are not.
    #[error("reserved bits are set in a page frame or request")]
    Reserved,
    /// Pages that the guest does not have, or none at all.
    #[error("pages {first}+{count} are not in a guest of {pages} pages")]
    OutOfRange {
        /// First page named.
        first: u64,
        /// Pages named.
        count: u32,
        /// Pages of the guest.
        pages: u64,
    },
    /// More pages with content than [`RUN_PAGES_MAX`].
    #[error("a page frame carries {0} pages, more than {RUN_PAGES_MAX}")]
    TooManyPages(u32),
    /// A length that does not go with the kind and the number of pages.
    #[error("a page frame of {count} pages says its content has {length} bytes")]
    Length {
        /// Pages named.
        count: u32,
        /// Bytes named.
        length: u32,
    },
    /// From another link epoch.
    #[error("a page frame or request of link epoch {got}; this is epoch {current}")]
    Epoch {
        /// The epoch named.
        got: u32,
        /// The current one.
        current: u32,
    },
}

impl FrameHeader {
    /// The header of a frame that carries the claimed pages: only who holds a claim
    /// can make one, so no page is framed twice. `kind` is not [`PageKind::Compressed`].
    pub fn for_claim(claim: &Claim, kind: PageKind, origin: Origin, epoch: u32) -> Self {
        debug_assert!(kind != PageKind::Compressed, "its length is not known");
        let run = claim.run();
        let content_len = if kind == PageKind::Raw { run.bytes() } else { 0 };
        Self { kind, origin, epoch, run, content_len }
    }

    /// The header of a frame that carries the claimed pages in so many bytes: at least one, and
    /// fewer than the pages have.
    pub fn for_compressed(claim: &Claim, content_len: usize, origin: Origin, epoch: u32) -> Self {
        debug_assert!((1..claim.run().bytes()).contains(&content_len), "{content_len} bytes");
        Self { kind: PageKind::Compressed, origin, epoch, run: claim.run(), content_len }
    }

    /// The header of the same frame once its pages are decompressed.
    pub fn decompressed(&self) -> Self {
        Self { kind: PageKind::Raw, content_len: self.run.bytes(), ..*self }
    }

    /// The same in two, of which the first has at most so many pages; in one, if it has
    /// content or no more pages.
    pub fn split(&self, pages_max: u64) -> (Self, Option<Self>) {
        let first = self.run.first();
        let left = self.run.count().saturating_sub(pages_max);
        let begin = PageRun::new(first, pages_max);
        let end = first.checked_add(pages_max).and_then(|page| PageRun::new(page, left));
        match (begin, end) {
            (Some(begin), Some(end)) if self.content_len == 0 => {
                (Self { run: begin, ..*self }, Some(Self { run: end, ..*self }))
            }
            _ => (*self, None),
        }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = self.kind as u8;
        bytes[1] = self.origin as u8;
        bytes[4..8].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.run.first().get().to_le_bytes());
        bytes[16..20].copy_from_slice(&(self.run.count() as u32).to_le_bytes());
        bytes[20..24].copy_from_slice(&(self.content_len as u32).to_le_bytes());
        bytes
    }

    /// Checks a received header.
    pub fn parse(bytes: &[u8; HEADER_LEN], limits: FrameLimits) -> Result<Self, FrameError> {
        let kind = match bytes[0] {
            0 => PageKind::Raw,
            1 => PageKind::Zero,
            2 => PageKind::Hole,
            3 if limits.compressed => PageKind::Compressed,
            4 => PageKind::Poison,
            other => return Err(FrameError::Kind(other)),
        };
        let origin = match bytes[1] {
            0 => Origin::Seed,
            1 => Origin::Demand,
            2 => Origin::Push,
            3 => Origin::Drain,
            // What cannot be read is told of when it is not read in vain any more.
            4 if kind != PageKind::Poison => Origin::Copy,
            other => return Err(FrameError::Origin(other)),
        };
        if bytes[2..4] != [0, 0] {
            return Err(FrameError::Reserved);
        }
        check_epoch(u32_at(bytes, 4), limits.epoch)?;
        let count = u32_at(bytes, 16);
        let run = run_in(u64_at(bytes, 8), count, limits.pages)?;
        let length = u32_at(bytes, 20);
        let bytes = || match count {
            ..=RUN_PAGES_MAX => Ok(count * PAGE_SIZE as u32),
            _ => Err(FrameError::TooManyPages(count)),
        };
        let fits = match kind {
            PageKind::Raw => length == bytes()?,
            PageKind::Compressed => (1..bytes()?).contains(&length),
            PageKind::Zero | PageKind::Hole | PageKind::Poison => length == 0,
        };
        if !fits {
            return Err(FrameError::Length { count, length });
        }
        let epoch = limits.epoch;
        Ok(Self { kind, origin, epoch, run, content_len: length as usize })
    }
}

/// A network fault on the wire: the destination asks for pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// Which pages.
    pub run: PageRun,
    /// The vCPU that waits, if one does.
    pub vcpu: Option<u16>,
    /// The link epoch.
    pub epoch: u32,
}

impl PageRequest {
    const NO_VCPU: u16 = u16::MAX;

    /// The request's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.run.first().get().to_le_bytes());
        bytes[8..12].copy_from_slice(&(self.run.count() as u32).to_le_bytes());
        bytes[12..14].copy_from_slice(&self.vcpu.unwrap_or(Self::NO_VCPU).to_le_bytes());
        bytes[16..20].copy_from_slice(&self.epoch.to_le_bytes());
        bytes
    }

    /// Checks a received request.
    pub fn parse(bytes: &[u8; HEADER_LEN], limits: FrameLimits) -> Result<Self, FrameError> {
        let count = u32_at(bytes, 8);
        if count > RUN_PAGES_MAX {
            return Err(FrameError::TooManyPages(count));
        }
        let run = run_in(u64_at(bytes, 0), count, limits.pages)?;
        let vcpu = u16::from_le_bytes([bytes[12], bytes[13]]);
        if bytes[14..16] != [0; 2] || bytes[20..24] != [0; 4] {
            return Err(FrameError::Reserved);
        }
        check_epoch(u32_at(bytes, 16), limits.epoch)?;
        let vcpu = (vcpu != Self::NO_VCPU).then_some(vcpu);
        Ok(Self { run, vcpu, epoch: limits.epoch })
    }
}

fn check_epoch(got: u32, current: u32) -> Result<(), FrameError> {
    if got != current { Err(FrameError::Epoch { got, current }) } else { Ok(()) }
}

fn run_in(first: u64, count: u32, pages: u64) -> Result<PageRun, FrameError> {
    PageRun::new(PageIndex::new(first), u64::from(count))
        .filter(|run| run.end() <= pages)
        .ok_or(FrameError::OutOfRange { first, count, pages })
}

fn u32_at(bytes: &[u8; HEADER_LEN], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8; HEADER_LEN], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: FrameLimits = FrameLimits { pages: 1000, epoch: 7, compressed: true };

    fn header(kind: PageKind, first: u64, count: u64) -> FrameHeader {
        let run = PageRun::new(PageIndex::new(first), count).unwrap();
        let content_len = match kind {
            PageKind::Raw => run.bytes(),
            PageKind::Compressed => run.bytes() / 3,
            _ => 0,
        };
        FrameHeader { kind, origin: Origin::Demand, epoch: 7, run, content_len }
    }

    #[test]
    fn the_bytes_on_the_wire_are_these() {
        let frame = header(PageKind::Raw, 0x1ff, 2).encode();
        assert_eq!(
            frame,
            [0, 1, 0, 0, 7, 0, 0, 0, 0xff, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0x20, 0, 0]
        );
        let run = PageRun::single(PageIndex::new(0x0102));
        let request = PageRequest { run, vcpu: Some(3), epoch: 7 }.encode();
        assert_eq!(
            request,
            [2, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]
        );
    }

    #[test]
    fn frames_without_content_are_split_and_nothing_of_them_is_lost() {
        for (kind, count, expected) in [
            (PageKind::Hole, 2500, vec![(0, 1024), (1024, 1024), (2048, 452)]),
            (PageKind::Zero, 1024, vec![(0, 1024)]),
            (PageKind::Raw, 1025, vec![(0, 1025)]),
        ] {
            let mut rest = Some(header(kind, 0, count));
            let mut pieces = vec![];
            while let Some(frame) = rest {
                let (piece, left) = frame.split(1024);
                assert_eq!((piece.kind, piece.epoch), (kind, 7));
                pieces.push((piece.run.first().get(), piece.run.count()));
                rest = left;
            }
            assert_eq!(pieces, expected);
        }
    }

    #[test]
    fn headers_out_of_bounds_are_refused_by_name() {
        let parse = |edit: fn(&mut [u8; HEADER_LEN])| {
            let mut bytes = header(PageKind::Raw, 0, 2).encode();
            edit(&mut bytes);
            FrameHeader::parse(&bytes, LIMITS).unwrap_err()
        };
        assert_eq!(parse(|b| b[0] = 5), FrameError::Kind(5));
        assert!(matches!(parse(|b| b[0] = 4), FrameError::Length { length: 8192, .. }));
        assert_eq!(parse(|b| b[1] = 9), FrameError::Origin(9));
        assert_eq!(parse(|b| b[2] = 1), FrameError::Reserved);
        assert_eq!(parse(|b| b[4] = 6), FrameError::Epoch { got: 6, current: 7 });
        assert!(matches!(parse(|b| b[16] = 0), FrameError::OutOfRange { count: 0, .. }));
        assert!(matches!(parse(|b| b[15] = 0xff), FrameError::OutOfRange { .. }));
        assert!(matches!(parse(|b| b[9] = 4), FrameError::OutOfRange { .. }));
        assert_eq!(parse(|b| b[16] = 65), FrameError::TooManyPages(65));
        assert!(matches!(parse(|b| b[20] = 1), FrameError::Length { .. }));
    }

    #[test]
    fn compressed_frames_are_smaller_than_their_pages_and_there_only_if_agreed_upon() {
        let parse = |count: u64, length: u32, limits: FrameLimits| {
            let mut bytes = header(PageKind::Compressed, 0, count).encode();
            bytes[20..24].copy_from_slice(&length.to_le_bytes());
            FrameHeader::parse(&bytes, limits)
        };
        for (count, length) in [(1, 1), (1, 4095), (64, 1), (64, 64 * 4096 - 1)] {
            let frame = parse(count, length, LIMITS).unwrap();
            assert_eq!((frame.content_len, frame.kind), (length as usize, PageKind::Compressed));
            let pages = frame.decompressed();
            let expected = (PageKind::Raw, frame.run, 4096 * count as usize);
            assert_eq!((pages.kind, pages.run, pages.content_len), expected);
            let not_agreed = FrameLimits { compressed: false, ..LIMITS };
            assert_eq!(parse(count, length, not_agreed), Err(FrameError::Kind(3)));
        }
        for (count, length) in [(1, 0), (1, 4096), (64, 64 * 4096), (2, u32::MAX)] {
            let count_named = count as u32;
            let refused = FrameError::Length { count: count_named, length };
            assert_eq!(parse(count, length, LIMITS), Err(refused));
        }
        assert_eq!(parse(65, 100, LIMITS), Err(FrameError::TooManyPages(65)));
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_parsed_again(
            first in 0u64..1000, count in 1u64..=64, kind in 0usize..5, vcpu in proptest::option::of(0u16..8)
        ) {
            prop_assume!(first + count <= LIMITS.pages);
            use PageKind::{Compressed, Hole, Poison, Raw, Zero};
            let frame = header([Raw, Zero, Hole, Compressed, Poison][kind], first, count);
            prop_assert_eq!(FrameHeader::parse(&frame.encode(), LIMITS), Ok(frame));
            let request = PageRequest { run: frame.run, vcpu, epoch: 7 };
            prop_assert_eq!(PageRequest::parse(&request.encode(), LIMITS), Ok(request));
        }

        #[test]
        fn no_bytes_make_it_panic_or_accept_a_page_out_of_range(bytes: [u8; HEADER_LEN]) {
            if let Ok(frame) = FrameHeader::parse(&bytes, LIMITS) {
                prop_assert!(frame.run.end() <= LIMITS.pages);
                prop_assert!(frame.content_len <= RUN_PAGES_MAX as usize * PAGE_SIZE);
                prop_assert!(frame.content_len <= frame.run.bytes());
            }
            if let Ok(request) = PageRequest::parse(&bytes, LIMITS) {
                prop_assert!(request.run.end() <= LIMITS.pages);
            }
        }
    }
}
