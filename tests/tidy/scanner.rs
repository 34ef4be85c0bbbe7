//! A scanner for Rust source, just good enough to lint imports: blanks out comments and
//! literals, cuts what is left into tokens and collects the paths.
//!
//! It knows nothing of macros and of names that shadow others; the layers need neither.

/// A path in a source file, from its first part on: `crate::proto::page` or `nix::libc`.
/// Of a grouped `use` there is one for each leaf.
pub type Path = Vec<String>;

/// The text with comments, strings and character literals blanked out; lines stay.
pub fn strip(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut kept = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = literal_or_comment_end(&chars, at);
        if end == at {
            kept.push(chars[at]);
            at += 1;
        } else {
            // A blank in its place keeps its neighbours apart.
            kept.push(' ');
            kept.extend(chars[at..end].iter().filter(|c| **c == '\n'));
            at = end;
        }
    }
    kept
}

/// Where the comment or literal ends that begins at `at`; `at` itself if none does.
fn literal_or_comment_end(chars: &[char], at: usize) -> usize {
    let is = |offset: usize, wanted: char| chars.get(at + offset) == Some(&wanted);
    let in_word = at > 0 && is_word(chars[at - 1]);
    match chars[at] {
        '/' if is(1, '/') => find(chars, at, |c, i| c[i] == '\n'),
        '/' if is(1, '*') => block_comment_end(chars, at),
        '"' => quoted_end(chars, at + 1, '"'),
        '\'' => char_end(chars, at),
        'r' | 'b' | 'c' if !in_word => {
            let mut open = at + 1;
            open += usize::from(chars[at] != 'r' && is(1, 'r'));
            let raw = chars[open - 1] == 'r';
            let hashes = chars[open..].iter().take_while(|c| **c == '#').count();
            match chars.get(open + hashes) {
                Some('"') if raw => raw_end(chars, open + hashes + 1, hashes),
                Some('"') if hashes == 0 => quoted_end(chars, open + 1, '"'),
                Some('\'') if hashes == 0 && chars[at] == 'b' => quoted_end(chars, open + 1, '\''),
                _ => at,
            }
        }
        _ => at,
    }
}

fn find(chars: &[char], from: usize, found: impl Fn(&[char], usize) -> bool) -> usize {
    (from..chars.len()).find(|i| found(chars, *i)).unwrap_or(chars.len())
}

fn block_comment_end(chars: &[char], start: usize) -> usize {
    let (mut depth, mut at) = (0, start);
    while at + 1 < chars.len() {
        match (chars[at], chars[at + 1]) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return at;
        }
    }
    chars.len()
}

fn quoted_end(chars: &[char], mut at: usize, quote: char) -> usize {
    while at < chars.len() && chars[at] != quote {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(chars.len())
}

fn raw_end(chars: &[char], from: usize, hashes: usize) -> usize {
    let close = find(chars, from, |c, i| {
        c[i] == '"' && c[i + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes
    });
    (close + 1 + hashes).min(chars.len())
}

/// A character literal's end, or `at` for a lifetime.
fn char_end(chars: &[char], at: usize) -> usize {
    match (chars.get(at + 1), chars.get(at + 2)) {
        (Some('\\'), _) => quoted_end(chars, at + 1, '\''),
        (Some(_), Some('\'')) => at + 3,
        _ => at,
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Words, `::`, and all other visible characters one by one.
pub fn tokens(stripped: &str) -> Vec<String> {
    let chars: Vec<char> = stripped.chars().collect();
    let mut tokens = Vec::new();
    let mut at = 0;
    while at < chars.len() {
        let end = if is_word(chars[at]) {
            find(&chars, at, |c, i| !is_word(c[i]))
        } else if chars[at..].starts_with(&[':', ':']) {
            at + 2
        } else {
            at + 1
        };
        if !chars[at].is_whitespace() {
            tokens.push(chars[at..end].iter().collect());
        }
        at = end;
    }
    tokens
}

/// All paths of a file that is the module `module` of its crate, each from `crate` or
/// another crate's name on. Bare names of one part are left out: what they stand for
/// was imported.
pub fn paths(stripped: &str, module: &[&str]) -> Vec<Path> {
    let tokens = tokens(stripped);
    let mut scan = Scan { tokens: &tokens, found: Vec::new() };
    let mut scope: Path = module.iter().map(ToString::to_string).collect();
    // For each open brace, whether it is a module's.
    let mut braces = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        match tokens[at].as_str() {
            "mod" if scan.is(at + 2, "{") => {
                scope.push(tokens[at + 1].clone());
                braces.push(true);
                at += 3;
            }
            "{" => {
                braces.push(false);
                at += 1;
            }
            "}" => {
                if braces.pop() == Some(true) {
                    scope.pop();
                }
                at += 1;
            }
            "use" => at = scan.tree(at + 1, &Path::new(), &scope, true),
            word if is_word(word.chars().next().unwrap_or(' ')) && scan.is(at + 1, "::") => {
                at = scan.tree(at, &Path::new(), &scope, false);
            }
            _ => at += 1,
        }
    }
    scan.found
}

struct Scan<'a> {
    tokens: &'a [String],
    found: Vec<Path>,
}

impl Scan<'_> {
    fn is(&self, at: usize, wanted: &str) -> bool {
        self.tokens.get(at).is_some_and(|token| token == wanted)
    }

    /// Takes in a path, or in a `use` a tree of them, and returns where it ends.
    fn tree(&mut self, mut at: usize, prefix: &Path, scope: &Path, grouped: bool) -> usize {
        let mut path = prefix.clone();
        while let Some(token) = self.tokens.get(at) {
            if grouped && token == "{" {
                at += 1;
                while at < self.tokens.len() && !self.is(at, "}") {
                    // What is no name, such as a comma, is stepped over.
                    let named = matches!(self.tokens[at].as_str(), "{" | "*")
                        || self.tokens[at].chars().all(is_word);
                    at = if named { self.tree(at, &path, scope, true) } else { at + 1 };
                }
                return at + 1;
            }
            if token == "::" {
                at += 1;
                continue;
            }
            if !(token == "*" && grouped || token.chars().all(is_word)) {
                break;
            }
            path.push(token.clone());
            at += 1;
            if !self.is(at, "::") {
                break;
            }
        }
        if grouped && self.is(at, "as") {
            at += 2;
        }
        if !path.is_empty() {
            self.found.push(from_crate(path, scope));
        }
        at
    }
}

/// Replaces a leading `self` or `super` by what it stands for.
fn from_crate(path: Path, scope: &Path) -> Path {
    let up = path.iter().take_while(|part| *part == "super").count();
    let own = path.first().is_some_and(|part| part == "self");
    if up == 0 && !own {
        return path;
    }
    let kept = scope.len().saturating_sub(up);
    let rest = path.into_iter().skip(if own { 1 } else { up });
    ["crate".to_owned()].into_iter().chain(scope[..kept].iter().cloned()).chain(rest).collect()
}

#[test]
fn comments_and_literals_are_no_code() {
    let text = "a /* x /* y */ z */ b // c\n\"d \\\" e\" f r#\"g \" h\"# b'\\'' 'i' '\\n' &'j k";
    assert_eq!(tokens(&strip(text)), ["a", "b", "f", "&", "'", "j", "k"]);
    assert_eq!(
        tokens(&strip("for r in b#x, br\"y\", c\"z\"")),
        ["for", "r", "in", "b", "#", "x", ",", ","]
    );
}

#[test]
fn paths_are_found_wherever_they_are() {
    let text = "
        use std::{io::{self, Read}, fmt}; pub(crate) use super::page as p;
        use super::*;
        mod tests { use super::super::frame::X; fn f() { nix::libc::c() } }
        fn g(a: &crate::uffd::Trap) -> Vec<self::y::Z> { \"crate::no\"; b::<c::D>() }
    ";
    let found: Vec<String> =
        paths(&strip(text), &["proto", "source"]).iter().map(|path| path.join("::")).collect();
    let expected = [
        "std::io::self",
        "std::io::Read",
        "std::fmt",
        "crate::proto::page",
        "crate::proto::*",
        "crate::proto::frame::X",
        "nix::libc::c",
        "crate::uffd::Trap",
        "crate::proto::source::y::Z",
        "b",
        "c::D",
    ];
    assert_eq!(found, expected);
}
