//! Memory of others by its address: the tensors of torch, whose arrays would cost more than a small lookup.
//!
//! Python hands over addresses and counts that it has read from live, contiguous CPU tensors in the same call, and holds
//! those tensors until the call returns. `vqrs._core` is private, and `vqrs.torch.operators` the one caller.

use numpy::{PyArray2, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use vqrs_core::kernels::{Ids, Output};
use vqrs_core::table::map::Watched;
use vqrs_core::tensor::{Buffer, Bytes};

/// Values at an address, checked to be aligned. `None` stands for no values.
fn pointer<T>(address: usize, count: usize) -> PyResult<Option<*mut T>> {
    if count == 0 {
        return Ok(None);
    }
    let fits = count.checked_mul(size_of::<T>()).is_some_and(|bytes| bytes <= isize::MAX as usize);
    if address == 0 || !address.is_multiple_of(align_of::<T>()) || !fits {
        return Err(PyValueError::new_err(format!("no {count} values can stand at address {address:#x}")));
    }
    Ok(Some(address as *mut T))
}

/// `count` values to read.
pub fn values<'a, T: bytemuck::Pod>(address: usize, count: usize) -> PyResult<&'a [T]> {
    let Some(pointer) = pointer::<T>(address, count)? else { return Ok(&[]) };
    // SAFETY: the caller holds a tensor of `count` values of this type at the address for the whole call (see the head of
    // this file); the pointer is not null, aligned, and the size fits (checked above); every bit pattern is valid for T.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// `count` values to fill, which no other argument of the call may overlap.
fn values_mut<'a, T: bytemuck::Pod>(address: usize, count: usize) -> PyResult<&'a mut [T]> {
    let Some(pointer) = pointer::<T>(address, count)? else { return Ok(&mut []) };
    // SAFETY: as in `values`; the tensor is the call's output, which the caller made for it or has checked to share no
    // memory with ids, offsets, weights or codes.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, count) })
}

/// Ids at an address: int64 if `wide`, else int32.
pub fn ids<'a>(address: usize, count: usize, wide: bool) -> PyResult<Ids<'a>> {
    Ok(if wide { Ids::I64(values(address, count)?) } else { Ids::I32(values(address, count)?) })
}

/// Rows to fill at an address.
pub fn output<'a>(address: usize, count: usize, dtype: &str) -> PyResult<Output<'a>> {
    Ok(match dtype {
        "float32" => Output::F32(values_mut(address, count)?),
        "float16" => Output::F16(values_mut(address, count)?),
        "bfloat16" => Output::Bf16(values_mut(address, count)?),
        other => return Err(PyTypeError::new_err(format!("rows cannot be {other}"))),
    })
}

/// The bytes of an array that stays where it is.
struct Borrowed {
    #[expect(dead_code, reason = "owned for its lifetime alone")]
    array: Py<PyArray2<u8>>,
    address: usize,
    len: usize,
    /// Codes of a mapped file are handed around as arrays too.
    file: Watched,
}

impl Bytes for Borrowed {
    fn bytes(&self) -> &[u8] {
        // SAFETY: `array` is C-contiguous, has `len` bytes at `address` (both read from it below) and lives as long as this
        // object; NumPy does not resize an array that others refer to.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.len) }
    }

    fn watch(&self) {
        self.file.watch();
    }

    fn damaged(&self) -> bool {
        self.file.damaged()
    }
}

/// Fails where memory at one of these addresses is that of a mapped file that was found cut: for whoever reads it himself,
/// before (so that a cut does not end the process) and after.
#[pyfunction]
pub fn intact_at(addresses: Vec<usize>) -> PyResult<()> {
    for address in addresses {
        let file = Watched::at(address);
        file.watch();
        if file.damaged() {
            let why = "the file was cut or overwritten while it was mapped";
            return Err(crate::error::to_py(vqrs_core::Error::corrupt("a mapped table", why)));
        }
    }
    Ok(())
}

/// A buffer of an array's bytes, without copying: later writes to the array are seen.
pub fn borrow(array: &Bound<'_, PyArray2<u8>>) -> PyResult<Buffer> {
    if array.len() == 0 {
        return Buffer::copy_of(&[]).map_err(crate::error::to_py);
    }
    if !array.is_c_contiguous() {
        return Err(PyTypeError::new_err("codes must be C-contiguous"));
    }
    let (address, len) = (array.data() as usize, array.len());
    let source = Borrowed { array: array.clone().unbind(), address, len, file: Watched::at(address) };
    Ok(Buffer::share(std::sync::Arc::new(source), 0..len))
}
