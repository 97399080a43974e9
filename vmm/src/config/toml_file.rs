//! A TOML file that is read strictly: all its mistakes at once, each with file, line, column, key and the
//! nearest valid name. Used for `guest.toml` and by the agent for its own configuration.

use std::fmt;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::shape;

/// A configuration larger than this is not one.
const LONGEST: u64 = 1 << 20;

/// Which key: `disk[0].remote.agent`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyPath(Vec<Segment>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Segment {
    Key(String),
    Index(usize),
}

impl KeyPath {
    /// The file's own table.
    #[must_use]
    pub fn root() -> Self {
        Self::default()
    }

    /// The key `name` of this table.
    #[must_use]
    pub fn key(&self, name: &str) -> Self {
        let mut path = self.clone();
        path.0.push(Segment::Key(name.to_owned()));
        path
    }

    /// The element `index` of this array, from 0.
    #[must_use]
    pub fn index(&self, index: usize) -> Self {
        let mut path = self.clone();
        path.0.push(Segment::Index(index));
        path
    }

    fn is_root(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for KeyPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Key(name) if at == 0 => write!(f, "{name}")?,
                Segment::Key(name) => write!(f, ".{name}")?,
                Segment::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

/// One mistake in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The file.
    pub file: PathBuf,
    /// Line and column in characters, both from 1; none when the file cannot be read at all.
    pub position: Option<(usize, usize)>,
    /// The key; empty for a mistake of syntax.
    pub key: String,
    /// What is wrong, and what would be right.
    pub what: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some((line, column)) = self.position {
            write!(f, ":{line}:{column}")?;
        }
        if !self.key.is_empty() {
            write!(f, ": key `{}`", self.key)?;
        }
        write!(f, ": {}", self.what)
    }
}

/// All mistakes of a file, in its order; at least one. Displays as one line for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistakes(pub Vec<Mistake>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, mistake) in self.0.iter().enumerate() {
            if at > 0 {
                writeln!(f)?;
            }
            write!(f, "{mistake}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Mistakes {}

/// Collects the mistakes of one file.
pub struct Checker<'a> {
    file: &'a Path,
    text: &'a str,
    /// None of a value that was not read from a text.
    tree: Option<&'a Spanned<DeTable<'a>>>,
    found: Vec<(usize, Mistake)>,
}

impl Checker<'_> {
    /// Notes that `key`'s value is wrong. `what` says why and what would be right.
    pub fn wrong(&mut self, key: &KeyPath, what: impl fmt::Display) {
        let offset = self.tree.map_or(0, |tree| locate(tree, key));
        self.note(offset, key, &what);
    }

    /// As [`Checker::wrong`], where the place is known.
    pub(super) fn note(&mut self, offset: usize, key: &KeyPath, what: &dyn fmt::Display) {
        let mistake = Mistake {
            file: self.file.to_owned(),
            position: self.tree.map(|_| position(self.text, offset)),
            key: key.to_string(),
            what: what.to_string(),
        };
        if !self.found.iter().any(|(at, known)| *at == offset && known.key == mistake.key) {
            self.found.push((offset, mistake));
        }
    }

    fn finish(mut self) -> Mistakes {
        self.found.sort_by_key(|(offset, _)| *offset);
        Mistakes(self.found.into_iter().map(|(_, mistake)| mistake).collect())
    }
}

/// Reads the file `path` as a `T` whose schema refuses unknown keys, and lets `validate` find what a schema
/// cannot say. Values that the file names are not looked at: use [`beside`] for relative paths.
///
/// # Errors
/// All mistakes at once; or one, that the file cannot be read.
pub fn load<T: DeserializeOwned + JsonSchema>(
    path: &Path,
    validate: impl FnOnce(&T, &mut Checker<'_>),
) -> Result<T, Mistakes> {
    let text = read(path).map_err(|why| {
        let what = why.to_string();
        Mistakes(vec![Mistake { file: path.to_owned(), position: None, key: String::new(), what }])
    })?;
    parse(path, &text, validate)
}

/// As [`load`], of a text that is at hand; `path` is only for messages.
///
/// # Errors
/// All mistakes at once.
pub fn parse<T: DeserializeOwned + JsonSchema>(
    path: &Path,
    text: &str,
    validate: impl FnOnce(&T, &mut Checker<'_>),
) -> Result<T, Mistakes> {
    let (tree, syntax) = DeTable::parse_recoverable(text);
    let mut checker = Checker { file: path, text, tree: Some(&tree), found: Vec::new() };
    for error in &syntax {
        checker.note(error.span().map_or(0, |span| span.start), &KeyPath::root(), &error.message());
    }
    if !syntax.is_empty() {
        // A tree that was recovered would only bring mistakes that are none.
        return Err(checker.finish());
    }
    shape::check::<T>(&tree, &mut checker);
    match toml::from_str::<T>(text) {
        Ok(value) => {
            validate(&value, &mut checker);
            if checker.found.is_empty() { Ok(value) } else { Err(checker.finish()) }
        }
        Err(error) => {
            if checker.found.is_empty() {
                let span = error.span().unwrap_or(0..0);
                checker.note(span.start, &key_at(&tree, &span), &error.message());
            }
            Err(checker.finish())
        }
    }
}

/// Has `validate` look at a value that was put together elsewhere; `from` says where, in messages.
///
/// # Errors
/// All mistakes at once.
pub fn validate(from: &Path, validate: impl FnOnce(&mut Checker<'_>)) -> Result<(), Mistakes> {
    let mut checker = Checker { file: from, text: "", tree: None, found: Vec::new() };
    validate(&mut checker);
    if checker.found.is_empty() { Ok(()) } else { Err(checker.finish()) }
}

/// `path` as seen from the folder of the file `config`: relative paths in a configuration are relative to
/// it, not to where a program happens to be started.
#[must_use]
pub fn beside(config: &Path, path: &Path) -> PathBuf {
    match config.parent() {
        Some(folder) if path.is_relative() => folder.join(path),
        _ => path.to_owned(),
    }
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let read = std::fs::File::open(path)?.take(LONGEST + 1).read_to_string(&mut text)?;
    if read as u64 > LONGEST {
        return Err(std::io::Error::other("larger than 1 MiB, so not a configuration"));
    }
    Ok(text)
}

/// Line and column, from 1, of the byte `offset`.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let mut end = offset.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let before = &text[..end];
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// Where `key` is written; of a key that is not there, where the innermost table around it is.
fn locate(tree: &Spanned<DeTable<'_>>, key: &KeyPath) -> usize {
    let mut segments = key.0.iter();
    let Some(Segment::Key(first)) = segments.next() else { return tree.span().start };
    let Some((name, mut value)) = tree.get_ref().get_key_value(first.as_str()) else {
        return tree.span().start;
    };
    let mut offset = name.span().start;
    for segment in segments {
        match (segment, value.get_ref()) {
            (Segment::Key(name), DeValue::Table(table)) => match table.get_key_value(name.as_str()) {
                Some((name, inner)) => {
                    offset = name.span().start;
                    value = inner;
                }
                None => break,
            },
            (Segment::Index(index), DeValue::Array(array)) => match array.get(*index) {
                Some(inner) => {
                    offset = inner.span().start;
                    value = inner;
                }
                None => break,
            },
            _ => break,
        }
    }
    offset
}

/// The innermost key whose value holds `span`.
fn key_at(tree: &Spanned<DeTable<'_>>, span: &Range<usize>) -> KeyPath {
    fn holds(outer: &Range<usize>, inner: &Range<usize>) -> bool {
        outer.start <= inner.start && inner.end <= outer.end
    }
    fn inside(value: &Spanned<DeValue<'_>>, path: KeyPath, span: &Range<usize>) -> Option<KeyPath> {
        let found = match value.get_ref() {
            DeValue::Table(table) => {
                table.iter().find_map(|(name, inner)| inside(inner, path.key(name.get_ref()), span))
            }
            DeValue::Array(array) => {
                (0..array.len()).find_map(|at| inside(array.get(at)?, path.index(at), span))
            }
            _ => None,
        };
        found.or_else(|| holds(&value.span(), span).then_some(path))
    }
    let root = KeyPath::root();
    let found = tree.get_ref().iter().find_map(|(name, value)| inside(value, root.key(name.get_ref()), span));
    found.filter(|path| !path.is_root()).unwrap_or_default()
}

/// `candidates`' nearest to what was written, if it is near enough to be meant.
#[must_use]
pub fn nearest<'a>(written: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let written = written.to_lowercase().replace('-', "_");
    candidates
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(&written, &name.to_lowercase().replace('-', "_")), name))
        .filter(|(distance, name)| *distance <= (name.chars().count() / 3).max(1) || is_part(&written, name))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// One is the beginning of the other, as `mem` of `memory` or `cpus` of `cpu`.
fn is_part(written: &str, name: &str) -> bool {
    written.len().min(name.len()) >= 3 && (name.starts_with(written) || written.starts_with(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_lines_and_characters_from_one() {
        let text = "a = 1\nüü = 2\n";
        assert_eq!(position(text, 0), (1, 1));
        assert_eq!(position(text, text.find('2').expect("there is a 2")), (2, 6));
        assert_eq!(position(text, 8), (2, 2), "an offset inside a character is that character's");
        assert_eq!(position(text, 999), (3, 1));
    }

    #[test]
    fn the_nearest_name_is_offered_only_when_it_may_be_meant() {
        let names = ["count", "size", "cmdline", "memory"];
        for (written, expected) in [
            ("cuont", Some("count")),
            ("Size", Some("size")),
            ("cmd-line", Some("cmdline")),
            ("mem", Some("memory")),
            ("zebra", None),
            ("x", None),
        ] {
            assert_eq!(nearest(written, names), expected, "{written}");
        }
    }

    #[test]
    fn relative_paths_are_beside_the_configuration() {
        assert_eq!(
            beside(Path::new("/etc/g/guest.toml"), Path::new("disk.raw")),
            Path::new("/etc/g/disk.raw")
        );
        assert_eq!(beside(Path::new("guest.toml"), Path::new("disk.raw")), Path::new("disk.raw"));
        assert_eq!(beside(Path::new("/etc/g/guest.toml"), Path::new("/d.raw")), Path::new("/d.raw"));
    }
}
