//! From [`vqrs_core::Error`] to Python's exceptions, in one place.

use pyo3::exceptions::{PyIndexError, PyKeyboardInterrupt, PyMemoryError, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use std::io::ErrorKind;
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
        // Python picks FileNotFoundError and its kin by the number, which wrapped errors have lost.
        Error::Io { path, source } => {
            let (number, reason) = match (source.raw_os_error(), source.kind()) {
                (_, ErrorKind::NotFound) => (2, "No such file or directory".to_owned()),
                (_, ErrorKind::IsADirectory) => (21, "Is a directory".to_owned()),
                (_, ErrorKind::PermissionDenied) => (13, "Permission denied".to_owned()),
                (Some(number), _) => (number, source.to_string()),
                (None, _) => return PyOSError::new_err(text),
            };
            let reason = reason.split(" (os error").next().unwrap_or_default().to_owned();
            PyOSError::new_err((number, reason, path.display().to_string()))
        }
        Error::Interrupted => PyKeyboardInterrupt::new_err(text),
        Error::Parameter { .. }
        | Error::UnknownKind { .. }
        | Error::Shape { .. }
        | Error::NotFinite { .. }
        | Error::OutOfRange { .. }
        | Error::Closed => PyValueError::new_err(text),
    }
}
