//! What went wrong, with the numbers.

use std::path::PathBuf;

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
        Error::Corrupt { path: path.into(), why: why.into() }
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

/// `count` zeros, or an error where there is no memory for them.
pub fn zeros<T: Clone + Default>(what: &'static str, count: Option<usize>) -> Result<Vec<T>> {
    let bytes = count.and_then(|count| count.checked_mul(size_of::<T>())).unwrap_or(usize::MAX);
    let mut values = Vec::new();
    match count.map(|count| values.try_reserve_exact(count)) {
        Some(Ok(())) => values.resize(count.unwrap_or_default(), T::default()),
        _ => return Err(Error::Memory { what, bytes }),
    }
    Ok(values)
}
