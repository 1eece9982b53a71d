//! From [`vqrs_core::Error`] to Python's exceptions, in one place.

use pyo3::exceptions::{PyIndexError, PyKeyboardInterrupt, PyMemoryError, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use std::io::{self, ErrorKind};
use std::path::Path;
use vqrs_core::Error;

pyo3::create_exception!(vqrs, TableError, PyValueError, "A table file cannot be used.");
pyo3::create_exception!(vqrs, TableCorruptError, TableError, "A table file is damaged, cut, or no table at all.");
pyo3::create_exception!(vqrs, TableVersionError, TableError, "A table file needs a newer version of vqrs.");
pyo3::create_exception!(vqrs, InternalError, PyRuntimeError, "A fault of vqrs itself: please report it.");

/// The Python exception of an error.
pub fn to_py(error: Error) -> PyErr {
    let text = error.to_string();
    match error {
        Error::Memory { .. } => PyMemoryError::new_err(text),
        Error::Id { .. } => PyIndexError::new_err(text),
        Error::Corrupt { .. } => TableCorruptError::new_err(text),
        Error::Version { .. } => TableVersionError::new_err(text),
        Error::Io { path, source } => os_error(&path, &source, ""),
        Error::System { path, source, why } => os_error(&path, &source, why),
        Error::Interrupted => PyKeyboardInterrupt::new_err(text),
        Error::Parameter { .. }
        | Error::UnknownKind { .. }
        | Error::UnknownForm { .. }
        | Error::Shape { .. }
        | Error::NotFinite { .. }
        | Error::OutOfRange { .. }
        | Error::Closed => PyValueError::new_err(text),
    }
}

/// Python picks FileNotFoundError and its kin by the number, which errors of our own do not have, and which is another
/// one on Windows.
fn os_error(path: &Path, source: &io::Error, why: &str) -> PyErr {
    let (number, reason) = match (source.raw_os_error().filter(|_| cfg!(unix)), source.kind()) {
        (Some(number), _) => (number, source.to_string()),
        (_, ErrorKind::NotFound) => (2, "No such file or directory".to_owned()),
        (_, ErrorKind::PermissionDenied) => (13, "Permission denied".to_owned()),
        (_, ErrorKind::IsADirectory) => (21, "Is a directory".to_owned()),
        (_, ErrorKind::StorageFull) => (28, "No space left on device".to_owned()),
        _ => return PyOSError::new_err(format!("{}: {source}", path.display())),
    };
    let reason = reason.split(" (os error").next().unwrap_or_default();
    let reason = [reason, why].join(if why.is_empty() { "" } else { ": " });
    PyOSError::new_err((number, reason, path.as_os_str().to_owned()))
}
