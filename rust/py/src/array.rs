//! NumPy views in, NumPy arrays out.

use half::f16;
use numpy::ndarray::{ArrayView, IxDyn};
use numpy::{
    Element, PyArray1, PyArray2, PyArrayDyn, PyArrayMethods, PyReadonlyArray2, PyReadonlyArrayDyn, PyUntypedArray,
    PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyMemoryError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyDict, PyTuple};
use serde_json::{Map, Value};
use vqrs_core::error::{room, Result};
use vqrs_core::kernels::{self, Output};
use vqrs_core::matrix::Matrix;
use vqrs_core::tensor::{Buffer, Dtype, Tensor};

/// Rows of a C-contiguous float32 array.
pub fn matrix<'a>(x: &'a PyReadonlyArray2<'_, f32>) -> PyResult<Matrix<'a>> {
    let [_, columns] = x.as_array().shape().try_into().unwrap_or([0, 0]);
    if !x.is_c_contiguous() || !x.data().is_aligned() {
        return Err(PyTypeError::new_err("X must be C-contiguous and aligned"));
    }
    let data = x.as_slice()?;
    if columns == 0 {
        return Err(PyValueError::new_err("Found array with 0 feature(s): at least 1 is needed"));
    }
    Matrix::new(data, columns).map_err(crate::error::to_py)
}

/// A new (rows, columns) array from values.
pub fn rows<'py, T: Element>(py: Python<'py>, values: Vec<T>, columns: usize) -> PyResult<Bound<'py, PyArray2<T>>> {
    let count = values.len().checked_div(columns).unwrap_or(0);
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
        Dtype::I8 => Ok(borrowed::<i8>(buffer, shape, keeper)?.into_any()),
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
        if !array.getattr("dtype")?.getattr("isnative")?.is_truthy()? {
            return Err(PyTypeError::new_err(format!("tensor {name} is not in this machine's byte order")));
        }
        let dtype = match array.getattr("dtype")?.getattr("name")?.extract::<String>()?.as_str() {
            "float16" => Dtype::F16,
            "float32" => Dtype::F32,
            "uint16" => Dtype::Bf16,
            "uint8" => Dtype::U8,
            "int8" => Dtype::I8,
            other => {
                return Err(PyTypeError::new_err(format!("tensor {name} is {other}, expected float16 or float32")))
            }
        };
        let shape: Vec<usize> = array.getattr("shape")?.extract()?;
        let bytes = array.call_method0("tobytes")?;
        let buffer = checked(Buffer::copy_of(bytes.extract::<&[u8]>()?))?;
        let tensor = checked(Tensor::new(name, dtype, shape, buffer))?;
        if !tensor.is_finite() {
            return Err(PyValueError::new_err(format!("tensor {} holds NaN or infinity", tensor.name)));
        }
        tensors.push(tensor);
    }
    Ok(tensors)
}

/// Mappings inside mappings that are followed: far more than parameters have. One may hold itself.
const DEEPEST: usize = 64;

/// A JSON object from a mapping of plain values.
pub fn to_json(mapping: &Bound<'_, PyAny>) -> PyResult<Map<String, Value>> {
    object_of(mapping, DEEPEST)
}

fn object_of(mapping: &Bound<'_, PyAny>, deepest: usize) -> PyResult<Map<String, Value>> {
    let deepest = deepest
        .checked_sub(1)
        .ok_or_else(|| PyValueError::new_err(format!("mappings stand inside each other more than {DEEPEST} deep")))?;
    let mut object = Map::new();
    for pair in mapping.call_method0("items")?.try_iter()? {
        let (name, value): (String, Bound<'_, PyAny>) = pair?.extract()?;
        object.insert(name.clone(), to_value(&name, &value, deepest)?);
    }
    Ok(object)
}

/// A copy of a string of Python's.
pub fn text(string: &str) -> PyResult<String> {
    if string.len() > LARGE / 16 {
        checked(room("a string", &[Some(string.len())]))?;
    }
    Ok(string.to_owned())
}

fn to_value(name: &str, value: &Bound<'_, PyAny>, deepest: usize) -> PyResult<Value> {
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
    } else if let Ok(string) = value.extract::<PyBackedStr>() {
        Ok(text(&string)?.into())
    } else if value.hasattr("items")? {
        Ok(Value::Object(object_of(&value, deepest)?))
    } else {
        let found = value.get_type().name()?.to_string();
        Err(PyTypeError::new_err(format!("{name} is of type {found}, expected a number, a string or a bool")))
    }
}

/// A Python value from JSON.
pub fn from_json<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    py.import("json")?.call_method1("loads", (value.to_string(),))
}

/// Borrowed ids of either type, of any shape.
pub enum Ids<'py> {
    /// 32-bit ids.
    I32(PyReadonlyArrayDyn<'py, i32>),
    /// 64-bit ids.
    I64(PyReadonlyArrayDyn<'py, i64>),
}

impl<'py> Ids<'py> {
    /// `None` for anything but a C-contiguous, aligned array of int32 or int64 in the machine's byte order; also for
    /// arrays of a class of their own, which may mean more than their values, such as masked ones.
    pub fn new(ids: &Bound<'py, PyAny>) -> PyResult<Option<Self>> {
        if !ids.is_exact_instance_of::<PyUntypedArray>() {
            return Ok(None);
        }
        if let Ok(array) = ids.cast::<PyArrayDyn<i64>>() {
            return Ok(plain(array).then(|| array.try_readonly()).transpose()?.map(Ids::I64));
        }
        if let Ok(array) = ids.cast::<PyArrayDyn<i32>>() {
            return Ok(plain(array).then(|| array.try_readonly()).transpose()?.map(Ids::I32));
        }
        Ok(None)
    }

    /// What the core reads.
    pub fn get(&self) -> PyResult<kernels::Ids<'_>> {
        Ok(match self {
            Ids::I32(array) => kernels::Ids::I32(array.as_slice()?),
            Ids::I64(array) => kernels::Ids::I64(array.as_slice()?),
        })
    }

    /// The ids' shape with one axis more.
    pub fn shape_of_rows(&self, dim: usize) -> Vec<usize> {
        let shape = match self {
            Ids::I32(array) => array.shape(),
            Ids::I64(array) => array.shape(),
        };
        shape.iter().copied().chain([dim]).collect()
    }
}

/// Whether a slice of Rust can stand for an array.
fn plain<T: Element>(array: &Bound<'_, PyArrayDyn<T>>) -> bool {
    array.is_c_contiguous() && array.data().is_aligned()
}

/// Rows that a call fills: the caller's array, or a fresh one.
pub enum Rows<'py> {
    /// Single precision.
    F32(Bound<'py, PyArrayDyn<f32>>),
    /// Half precision.
    F16(Bound<'py, PyArrayDyn<f16>>),
    /// The bits of bfloat16, which NumPy does not have.
    Bf16(Bound<'py, PyArrayDyn<u16>>),
}

/// Bytes above which NumPy itself makes the array: it raises a MemoryError where there is no room. NumPy asks for large
/// pages, without which mapping a fresh array would take ten times as long as filling it.
const LARGE: usize = 1 << 24;

/// Bytes of results from which NumPy makes them, which tells where there is no memory.
const FRESH: usize = 1 << 20;

impl<'py> Rows<'py> {
    /// `out` checked to be a writable, C-contiguous array of this shape, or a fresh one of `dtype`, float32 by default
    /// and uint16 for bfloat16. `None` if `out` is no array.
    pub fn new(
        py: Python<'py>,
        out: Option<&Bound<'py, PyAny>>,
        shape: &[usize],
        dtype: Option<&str>,
    ) -> PyResult<Option<Self>> {
        match out {
            None => Rows::fresh(py, shape, dtype).map(Some),
            Some(out) => out.cast::<PyUntypedArray>().ok().map(|out| Rows::given(out, shape, dtype)).transpose(),
        }
    }

    fn fresh(py: Python<'py>, shape: &[usize], dtype: Option<&str>) -> PyResult<Self> {
        let dtype = dtype.unwrap_or("float32");
        // Sizes of zero hide others that NumPy refuses, as it does more axes than it knows.
        let bytes = shape.iter().try_fold(4usize, |bytes, size| bytes.checked_mul((*size).max(1)));
        if bytes.is_none_or(|bytes| bytes > FRESH) || shape.len() > 32 {
            let name = if dtype == "bfloat16" { "uint16" } else { dtype };
            let array = py.import("numpy")?.call_method1("empty", (shape, name))?;
            return Rows::given(array.cast()?, shape, Some(dtype));
        }
        let shape = IxDyn(shape);
        // SAFETY: numbers have no invalid bit patterns, and every caller fills the whole array before it is returned (an
        // error drops it).
        let new = || unsafe {
            match dtype {
                "float16" => Rows::F16(PyArrayDyn::new(py, shape, false)),
                "bfloat16" => Rows::Bf16(PyArrayDyn::new(py, shape, false)),
                _ => Rows::F32(PyArrayDyn::new(py, shape, false)),
            }
        };
        // Where there is no memory even for these, the binding panics.
        let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(new));
        made.map_err(|_| PyErr::take(py).unwrap_or_else(|| PyMemoryError::new_err("no memory for the rows")))
    }

    fn given(out: &Bound<'py, PyUntypedArray>, shape: &[usize], dtype: Option<&str>) -> PyResult<Self> {
        if out.shape() != shape {
            let expected = PyTuple::new(out.py(), shape)?;
            let text = format!("out has shape {}, expected {expected}", out.getattr("shape")?);
            return Err(PyValueError::new_err(text));
        }
        let rows = if let Ok(array) = out.cast::<PyArrayDyn<f32>>() {
            Rows::F32(array.clone())
        } else if let Ok(array) = out.cast::<PyArrayDyn<f16>>() {
            Rows::F16(array.clone())
        } else {
            match (out.getattr("dtype")?.getattr("name")?.extract::<String>()?.as_str(), dtype) {
                ("bfloat16", _) | ("uint16", Some("bfloat16")) => {
                    Rows::Bf16(out.call_method1("view", ("uint16",))?.cast_into()?)
                }
                (other, _) => {
                    let text = format!("out has dtype {other}, expected float32, float16 or bfloat16");
                    return Err(PyTypeError::new_err(text));
                }
            }
        };
        if let Some(dtype) = dtype.filter(|dtype| *dtype != rows.dtype()) {
            let text = format!("out has dtype {}, but dtype is {dtype}: leave one of them out", rows.dtype());
            return Err(PyTypeError::new_err(text));
        }
        let fits = match &rows {
            Rows::F32(array) => plain(array),
            Rows::F16(array) => plain(array),
            Rows::Bf16(array) => plain(array),
        };
        fits.then_some(rows).ok_or_else(|| PyValueError::new_err("out must be C-contiguous, aligned and writeable"))
    }

    fn dtype(&self) -> &'static str {
        match self {
            Rows::F32(_) => "float32",
            Rows::F16(_) => "float16",
            Rows::Bf16(_) => "bfloat16",
        }
    }

    /// Fills the rows.
    pub fn fill(&self, work: impl FnOnce(Output<'_>) -> PyResult<()>) -> PyResult<()> {
        let refused = |_| PyValueError::new_err("out must be writeable, and share no memory with the other arguments");
        match self {
            Rows::F32(array) => work(Output::F32(array.try_readwrite().map_err(refused)?.as_slice_mut()?)),
            Rows::F16(array) => {
                let mut array = array.try_readwrite().map_err(refused)?;
                work(Output::F16(bytemuck::cast_slice_mut(array.as_slice_mut()?)))
            }
            Rows::Bf16(array) => work(Output::Bf16(array.try_readwrite().map_err(refused)?.as_slice_mut()?)),
        }
    }

    /// The array.
    pub fn into_any(self) -> Bound<'py, PyAny> {
        match self {
            Rows::F32(array) => array.into_any(),
            Rows::F16(array) => array.into_any(),
            Rows::Bf16(array) => array.into_any(),
        }
    }
}

/// The error of a core call, as Python's.
pub fn checked<T>(result: Result<T>) -> PyResult<T> {
    result.map_err(crate::error::to_py)
}
