//! NumPy views in, NumPy arrays out.

use numpy::ndarray::{ArrayView, IxDyn};
use numpy::{Element, PyArray1, PyArray2, PyArrayDyn, PyArrayMethods, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::{Map, Value};
use vqrs_core::error::Result;
use vqrs_core::matrix::Matrix;
use vqrs_core::tensor::{Buffer, Dtype, Tensor};

/// Rows of a C-contiguous float32 array.
pub fn matrix<'a>(x: &'a PyReadonlyArray2<'_, f32>) -> PyResult<Matrix<'a>> {
    let [_, columns] = x.as_array().shape().try_into().unwrap_or([0, 0]);
    let data = x.as_slice().map_err(|_| PyTypeError::new_err("X must be C-contiguous"))?;
    if columns == 0 {
        return Err(PyValueError::new_err("Found array with 0 feature(s): at least 1 is needed"));
    }
    Matrix::new(data, columns).map_err(crate::error::to_py)
}

/// A new (rows, columns) array from values.
pub fn rows<'py, T: Element>(py: Python<'py>, values: Vec<T>, columns: usize) -> PyResult<Bound<'py, PyArray2<T>>> {
    let count = values.len() / columns;
    PyArray1::from_vec(py, values).reshape([count, columns])
}

/// Keeps a buffer alive for the array that looks into it.
#[pyclass(frozen, module = "vqrs._core")]
struct Keeper(#[expect(dead_code, reason = "owned for its lifetime alone")] Buffer);

/// An array over a buffer's bytes, without copying. bfloat16 comes as uint16.
pub fn view<'py>(py: Python<'py>, buffer: &Buffer, dtype: Dtype, shape: &[usize]) -> PyResult<Bound<'py, PyAny>> {
    let keeper = Bound::new(py, Keeper(buffer.clone()))?.into_any();
    match dtype {
        Dtype::U8 => Ok(borrowed::<u8>(buffer, shape, keeper)?.into_any()),
        Dtype::Bf16 => Ok(borrowed::<u16>(buffer, shape, keeper)?.into_any()),
        Dtype::U64 => Ok(borrowed::<u64>(buffer, shape, keeper)?.into_any()),
        Dtype::F32 => Ok(borrowed::<f32>(buffer, shape, keeper)?.into_any()),
        // The bytes of a float16 are seen as such by NumPy itself: `half` is not a type of this crate's.
        Dtype::F16 => borrowed::<u16>(buffer, shape, keeper)?.call_method1("view", ("float16",)),
    }
}

fn borrowed<'py, T: Element + Copy>(
    buffer: &Buffer,
    shape: &[usize],
    keeper: Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    let count: usize = shape.iter().product();
    let bytes = buffer.bytes();
    if bytes.len() != count * size_of::<T>() || bytes.as_ptr().align_offset(align_of::<T>()) != 0 {
        return Err(PyValueError::new_err("a tensor's bytes do not match its shape"));
    }
    // SAFETY: the pointer is aligned for T and holds `count` values (checked above); T is a plain number, for which
    // every bit pattern is valid. `keeper` owns a clone of the buffer and becomes the array's base, so the bytes outlive
    // the array and do not move.
    unsafe {
        let view = ArrayView::from_shape_ptr(IxDyn(shape), bytes.as_ptr().cast::<T>());
        Ok(PyArrayDyn::borrow_from_array(&view, keeper))
    }
}

/// Tensors as a dict of arrays, without copying.
pub fn tensors<'py>(py: Python<'py>, tensors: &[Tensor]) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for tensor in tensors {
        dict.set_item(&tensor.name, view(py, &tensor.data, tensor.dtype, &tensor.shape)?)?;
    }
    Ok(dict)
}

/// Tensors from a dict of C-contiguous arrays: float16, float32, uint8 and uint16 (bfloat16).
pub fn tensors_from(dict: &Bound<'_, PyDict>) -> PyResult<Vec<Tensor>> {
    let mut tensors = Vec::new();
    for (name, array) in dict.iter() {
        let name: String = name.extract()?;
        let dtype = match array.getattr("dtype")?.getattr("name")?.extract::<String>()?.as_str() {
            "float16" => Dtype::F16,
            "float32" => Dtype::F32,
            "uint16" => Dtype::Bf16,
            "uint8" => Dtype::U8,
            other => {
                return Err(PyTypeError::new_err(format!("tensor {name} is {other}, expected float16 or float32")))
            }
        };
        let shape: Vec<usize> = array.getattr("shape")?.extract()?;
        let bytes: Vec<u8> = array.call_method0("tobytes")?.extract::<&[u8]>()?.to_vec();
        let tensor = checked(Tensor::new(name, dtype, shape, Buffer::copy_of(&bytes)))?;
        if !tensor.is_finite() {
            return Err(PyValueError::new_err(format!("tensor {} holds NaN or infinity", tensor.name)));
        }
        tensors.push(tensor);
    }
    Ok(tensors)
}

/// A JSON object from a mapping of plain values.
pub fn to_json(mapping: &Bound<'_, PyAny>) -> PyResult<Map<String, Value>> {
    let mut object = Map::new();
    for pair in mapping.call_method0("items")?.try_iter()? {
        let (name, value): (String, Bound<'_, PyAny>) = pair?.extract()?;
        object.insert(name.clone(), to_value(&name, &value)?);
    }
    Ok(object)
}

fn to_value(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Value> {
    // NumPy's numbers become Python's own.
    let value = match value.hasattr("item")? {
        true => value.call_method0("item")?,
        false => value.clone(),
    };
    if value.is_none() {
        Ok(Value::Null)
    } else if let Ok(flag) = value.cast::<pyo3::types::PyBool>() {
        Ok(flag.is_true().into())
    } else if let Ok(number) = value.extract::<i64>() {
        Ok(number.into())
    } else if let Ok(number) = value.extract::<f64>() {
        Ok(number.into())
    } else if let Ok(text) = value.extract::<String>() {
        Ok(text.into())
    } else {
        let found = value.get_type().name()?.to_string();
        Err(PyTypeError::new_err(format!("{name} is of type {found}, expected a number, a string or a bool")))
    }
}

/// A Python value from JSON.
pub fn from_json<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    py.import("json")?.call_method1("loads", (value.to_string(),))
}

/// `Some(out)` checked to be a C-contiguous float32 (rows, columns) array that can be written, or a fresh one.
pub fn output<'py>(
    py: Python<'py>,
    out: Option<Bound<'py, PyArray2<f32>>>,
    shape: [usize; 2],
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let Some(out) = out else {
        // SAFETY: float32 has no invalid bit patterns, and every caller fills the whole array before it is returned
        // (an error drops it).
        return Ok(unsafe { PyArray2::new(py, shape, false) });
    };
    if out.shape() != shape || !out.is_c_contiguous() {
        return Err(PyValueError::new_err(format!(
            "out has shape {:?}, expected a C-contiguous float32 array of shape ({}, {})",
            out.shape(),
            shape[0],
            shape[1]
        )));
    }
    Ok(out)
}

/// The error of a core call, as Python's.
pub fn checked<T>(result: Result<T>) -> PyResult<T> {
    result.map_err(crate::error::to_py)
}
