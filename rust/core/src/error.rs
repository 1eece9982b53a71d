//! What went wrong, with the numbers.

use std::path::PathBuf;

/// Most characters of what is said of a damaged file.
const MOST_CHARACTERS: usize = 1000;

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong. Each message says what was found, what was expected and, where that helps, what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A parameter has a value that is not allowed.
    #[error("{name}={value} is not allowed: {expected}")]
    Parameter {
        /// The parameter's name, as the user wrote it.
        name: String,
        /// The value that was refused.
        value: String,
        /// What would have been accepted.
        expected: String,
    },
    /// No quantizer has this name.
    #[error("unknown kind {name:?}: expected one of {known}")]
    UnknownKind {
        /// The name that was given.
        name: String,
        /// The names that exist, separated by commas.
        known: String,
    },
    /// No decoder form has this name.
    #[error("the decoder form {form:?} is unknown: this version reads {known}")]
    UnknownForm {
        /// The name that was found.
        form: String,
        /// The names that exist, separated by commas.
        known: String,
    },
    /// An array has the wrong shape or length.
    #[error("{what} has {found}, expected {expected}")]
    Shape {
        /// Which array.
        what: &'static str,
        /// What it has.
        found: String,
        /// What it should have.
        expected: String,
    },
    /// The input holds NaN or infinity.
    #[error("Input {what} contains {value} at row {row}, column {column}: clean it first, for example with numpy.nan_to_num")]
    NotFinite {
        /// Which input.
        what: &'static str,
        /// Row of the first offending value.
        row: usize,
        /// Column of the first offending value.
        column: usize,
        /// "NaN" or "infinity".
        value: &'static str,
    },
    /// A value cannot be held by the chosen type.
    #[error("{what}: {why}")]
    OutOfRange {
        /// What does not fit.
        what: String,
        /// Why, and what to do.
        why: String,
    },
    /// A row id is outside the table.
    #[error("id {id} at position {position} is out of range for a table of {rows} rows")]
    Id {
        /// The id.
        id: i64,
        /// Where it stands in the ids that were given.
        position: usize,
        /// Rows of the table.
        rows: usize,
    },
    /// There is no memory for a result.
    #[error("{what} would take {bytes} bytes, more than there is memory for: work in smaller blocks")]
    Memory {
        /// Which result.
        what: &'static str,
        /// Its size; the largest number where that is beyond counting.
        bytes: usize,
    },
    /// The file is damaged, cut, or not a table.
    #[error("{}: {why}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        why: String,
    },
    /// The file needs a newer reader.
    #[error("{}: {why}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// What it needs.
        why: String,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The operating system refused, and there is more to say.
    #[error("{}: {source}: {why}", path.display())]
    System {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
        /// What it means, or what to do.
        why: &'static str,
    },
    /// The table was closed.
    #[error("the table is closed: open it again with vqrs.open")]
    Closed,
    /// The caller asked to stop (Ctrl-C).
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// A refused parameter.
    pub fn parameter(name: impl Into<String>, value: impl ToString, expected: impl Into<String>) -> Self {
        Error::Parameter { name: name.into(), value: value.to_string(), expected: expected.into() }
    }

    /// The same error with rows counted from `start`: for blocks of a larger table.
    pub fn after_rows(self, start: usize) -> Self {
        match self {
            Error::NotFinite { what, row, column, value } => Error::NotFinite { what, row: row + start, column, value },
            other => other,
        }
    }

    /// The same error about another input than `X`.
    pub fn about(self, what: &'static str) -> Self {
        match self {
            Error::NotFinite { row, column, value, .. } => Error::NotFinite { what, row, column, value },
            other => other,
        }
    }

    /// An array of the wrong shape.
    pub fn shape(what: &'static str, found: impl Into<String>, expected: impl Into<String>) -> Self {
        Error::Shape { what, found: found.into(), expected: expected.into() }
    }

    /// A damaged file.
    pub fn corrupt(path: impl Into<PathBuf>, why: impl Into<String>) -> Self {
        // Files may hold texts of megabytes that are wrong.
        let mut why = why.into();
        if let Some((end, _)) = why.char_indices().nth(MOST_CHARACTERS) {
            why.truncate(end);
            why += "...";
        }
        Error::Corrupt { path: path.into(), why }
    }

    /// An operating system error on a file.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { path: path.into(), source }
    }

    /// An operating system error on a file, with what it means or what to do.
    pub fn system(path: impl Into<PathBuf>, source: std::io::Error, why: &'static str) -> Self {
        Error::System { path: path.into(), source, why }
    }
}

/// Bytes of what a call allocates in small pieces, which cannot fail one by one: its threads, blocks of rows, tasks.
const SMALL: usize = 64 << 20;

fn no_room(what: &'static str, bytes: Option<usize>) -> Error {
    Error::Memory { what, bytes: bytes.unwrap_or(usize::MAX) }
}

/// `count` zeros, or an error where there is no memory for them.
pub fn zeros<T: bytemuck::Zeroable>(what: &'static str, count: Option<usize>) -> Result<Vec<T>> {
    let bytes = count.and_then(|count| count.checked_mul(size_of::<T>()));
    let fits = bytes.filter(|bytes| *bytes <= isize::MAX as usize).and(count);
    // The system's own zeros: pages are made when they are first used.
    fits.and_then(|count| bytemuck::try_zeroed_vec(count).ok()).ok_or_else(|| no_room(what, bytes))
}

/// No values yet and room for `count` of them, or an error where there is no memory for them.
pub fn reserved<T>(what: &'static str, count: Option<usize>) -> Result<Vec<T>> {
    let mut values = Vec::new();
    match count.map(|count| values.try_reserve_exact(count)) {
        Some(Ok(())) => Ok(values),
        _ => Err(no_room(what, count.and_then(|count| count.checked_mul(size_of::<T>())))),
    }
}

/// A copy of some values, or an error where there is no memory for it.
pub fn copied<T: Copy>(what: &'static str, values: &[T]) -> Result<Vec<T>> {
    let mut copy = reserved(what, Some(values.len()))?;
    copy.extend_from_slice(values);
    Ok(copy)
}

/// Fails where there is no memory for parts of so many bytes together and for a call's small pieces: before work that
/// allocates in many places.
pub fn room(what: &'static str, parts: &[Option<usize>]) -> Result<()> {
    // Tasks side by side would all ask for the small pieces at once.
    let small = if rayon::current_thread_index().is_some() { 0 } else { SMALL };
    let all = parts.iter().try_fold(small, |sum, part| sum.checked_add((*part)?));
    let asked: Vec<u8> = reserved(what, all)?;
    // Or it would not be asked for at all.
    std::hint::black_box(&asked);
    Ok(())
}

/// The product of sizes, if it can be counted.
pub fn product(sizes: &[usize]) -> Option<usize> {
    sizes.iter().try_fold(1usize, |product, size| product.checked_mul(*size))
}
