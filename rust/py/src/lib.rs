//! The compiled module `vqrs._core`: converts, releases the GIL, maps errors. Nothing else happens here.

mod address;
mod array;
mod call;
mod codec;
mod error;
mod kmeans;
mod table;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use vqrs_core::kernels;

/// The instruction sets of this machine and the threads that a call uses.
#[pyfunction]
fn hardware(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("simd", kernels::best().name)?;
    dict.set_item("available", kernels::available().iter().map(|k| k.name).collect::<Vec<_>>())?;
    dict.set_item("threads", vqrs_core::pool::threads(None))?;
    dict.set_item("architecture", std::env::consts::ARCH)?;
    Ok(dict)
}

#[pymodule(gil_used = false)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    vqrs_core::table::map::watch_forks();
    if let Some(text) = kernels::forced_error() {
        let category = py.get_type::<pyo3::exceptions::PyRuntimeWarning>();
        PyErr::warn(py, &category, &std::ffi::CString::new(text)?, 1)?;
    }
    module.add("__version__", vqrs_core::VERSION)?;
    module.add("TableError", py.get_type::<error::TableError>())?;
    module.add("TableCorruptError", py.get_type::<error::TableCorruptError>())?;
    module.add("TableVersionError", py.get_type::<error::TableVersionError>())?;
    module.add("InternalError", py.get_type::<error::InternalError>())?;
    module.add_class::<codec::Codec>()?;
    module.add_class::<table::Table>()?;
    module.add_class::<table::TableWriter>()?;
    module.add_function(wrap_pyfunction!(hardware, module)?)?;
    module.add_function(wrap_pyfunction!(address::intact_at, module)?)?;
    module.add_function(wrap_pyfunction!(codec::kinds, module)?)?;
    module.add_function(wrap_pyfunction!(codec::estimate, module)?)?;
    module.add_function(wrap_pyfunction!(codec::fit, module)?)?;
    module.add_function(wrap_pyfunction!(codec::check_rows, module)?)?;
    module.add_function(wrap_pyfunction!(codec::reconstruction_errors, module)?)?;
    module.add_function(wrap_pyfunction!(kmeans::kmeans_fit, module)?)?;
    module.add_function(wrap_pyfunction!(kmeans::kmeans_predict, module)?)?;
    module.add_function(wrap_pyfunction!(kmeans::kmeans_transform, module)?)?;
    Ok(())
}
