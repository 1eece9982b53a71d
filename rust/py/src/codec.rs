//! Class `Codec`: one for all quantizers.

use crate::array::{checked, from_json, matrix, rows, tensors, tensors_from, to_json};
use crate::call::{long, short};
use numpy::{PyArray2, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use serde_json::{Map, Value};
use vqrs_core::decoder::Decoder;
use vqrs_core::error::{Error, Result};
use vqrs_core::matrix::{check_weights, Matrix, Sample};
use vqrs_core::pool::Context;
use vqrs_core::quantizer::{self, ErrorSums, BLOCK_ROWS, KINDS};

/// A quantizer with the decoder it learned.
#[pyclass(frozen, module = "vqrs._core")]
pub struct Codec {
    pub codec: quantizer::Codec,
    relative_error: f64,
}

impl Codec {
    pub fn new(codec: quantizer::Codec, relative_error: f64) -> Self {
        Codec { codec, relative_error }
    }
}

/// One dict a quantizer: name, about, form, parameters with their defaults.
#[pyfunction]
pub fn kinds(py: Python<'_>) -> PyResult<Bound<'_, PyList>> {
    let list = PyList::empty(py);
    for kind in KINDS {
        let quantizer = checked(kind.make(Map::new()))?;
        let dict = PyDict::new(py);
        dict.set_item("name", kind.name)?;
        dict.set_item("about", kind.about)?;
        dict.set_item("form", short(|| quantizer.blank(1, 1))?.form())?;
        dict.set_item("parameters", from_json(py, &Value::Object(quantizer.parameters()))?)?;
        list.append(dict)?;
    }
    Ok(list)
}

/// Bytes of the table's file, names and user metadata aside.
#[pyfunction]
pub fn estimate(kind: &str, parameters: &Bound<'_, PyAny>, n_rows: i64, n_features: i64) -> PyResult<u64> {
    let size = |name: &str, size: i64| {
        usize::try_from(size).map_err(|_| crate::error::to_py(Error::parameter(name, size, "must be at least 1")))
    };
    let (n_rows, n_features) = (size("n_rows", n_rows)?, size("n_features", n_features)?);
    let parameters = to_json(parameters)?;
    short(|| vqrs_core::stream::estimate(kind, parameters, n_rows, n_features))
}

/// Learns from x; returns the codec and the codes of x.
#[pyfunction]
#[pyo3(signature = (kind, parameters, x, *, sample_weight=None, seed=0, n_jobs=None, progress=None, keep_better_codes=false))]
#[allow(clippy::type_complexity)]
pub fn fit<'py>(
    py: Python<'py>,
    kind: &str,
    parameters: &Bound<'py, PyAny>,
    x: PyReadonlyArray2<'py, f32>,
    sample_weight: Option<PyReadonlyArray1<'py, f64>>,
    seed: u64,
    n_jobs: Option<i64>,
    progress: Option<Bound<'py, PyAny>>,
    keep_better_codes: bool,
) -> PyResult<(Codec, Bound<'py, PyArray2<u8>>)> {
    let (parameters, x) = (to_json(parameters)?, matrix(&x)?);
    let weights = sample_weight.as_ref().map(|w| w.as_slice()).transpose()?;
    let ctx = Context::new(n_jobs, seed);
    let (codec, codes, error) = long(py, &ctx, progress.as_ref(), || {
        let sample = Sample::new(x, weights, &ctx)?;
        let (codec, codes) = quantizer::Codec::fit(kind, parameters, sample, keep_better_codes, &ctx)?;
        let errors = errors(x, &codes, None, &codec, &ctx)?;
        let error = errors.get("relative").and_then(Value::as_f64).unwrap_or(f64::NAN);
        Ok((codec, codes, error))
    })?;
    let bytes = codec.decoder().row_bytes();
    Ok((Codec::new(codec, error), rows(py, codes, bytes)?))
}

fn errors(
    x: Matrix,
    codes: &[u8],
    weights: Option<&[f64]>,
    codec: &quantizer::Codec,
    ctx: &Context,
) -> Result<Map<String, Value>> {
    let bytes = codec.decoder().row_bytes();
    if codes.len() != x.rows() * bytes || x.dim() != codec.decoder().dim() {
        let expected = format!("{} rows of {bytes} bytes", x.rows());
        return Err(Error::shape("codes", format!("{} bytes", codes.len()), expected));
    }
    let mut sums = ErrorSums::default();
    sums.add(x, codes, weights, codec.decoder(), ctx)?;
    Ok(sums.finish(weights.is_some()))
}

/// Refuses what a fit refuses in rows and weights.
#[pyfunction]
#[pyo3(signature = (x, sample_weight=None))]
pub fn check_rows<'py>(
    py: Python<'py>,
    x: PyReadonlyArray2<'py, f32>,
    sample_weight: Option<PyReadonlyArray1<'py, f64>>,
) -> PyResult<()> {
    let x = matrix(&x)?;
    let weights = sample_weight.as_ref().map(|w| w.as_slice()).transpose()?;
    let ctx = Context::new(None, 0);
    long(py, &ctx, None, || {
        x.check_all(&ctx)?;
        weights.map_or(Ok(()), check_weights)
    })
}

/// Relative errors of codes: `relative`, `centred` and, with weights, `weighted`.
#[pyfunction]
#[pyo3(signature = (x, codes, codec, sample_weight=None, n_jobs=None))]
pub fn reconstruction_errors<'py>(
    py: Python<'py>,
    x: PyReadonlyArray2<'py, f32>,
    codes: PyReadonlyArray2<'py, u8>,
    codec: &Codec,
    sample_weight: Option<PyReadonlyArray1<'py, f64>>,
    n_jobs: Option<i64>,
) -> PyResult<Bound<'py, PyAny>> {
    let (x, codes) = (matrix(&x)?, codes.as_slice()?);
    let weights = sample_weight.as_ref().map(|w| w.as_slice()).transpose()?;
    if weights.is_some_and(|w| w.len() != x.rows()) {
        return Err(PyValueError::new_err(format!(
            "sample_weight must have one value for each of the {} rows",
            x.rows()
        )));
    }
    let ctx = Context::new(n_jobs, 0);
    let errors = long(py, &ctx, None, || errors(x, codes, weights, &codec.codec, &ctx))?;
    from_json(py, &Value::Object(errors))
}

#[pymethods]
impl Codec {
    #[getter]
    fn kind(&self) -> &'static str {
        self.codec.kind()
    }

    #[getter]
    fn form(&self) -> &'static str {
        self.codec.decoder().form()
    }

    #[getter]
    fn parameters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        from_json(py, &Value::Object(self.codec.parameters()))
    }

    #[getter]
    fn dim(&self) -> usize {
        self.codec.decoder().dim()
    }

    #[getter]
    fn row_bytes(&self) -> usize {
        self.codec.decoder().row_bytes()
    }

    #[getter]
    fn n_iter(&self) -> usize {
        self.codec.n_iter
    }

    #[getter]
    fn relative_error(&self) -> f64 {
        self.relative_error
    }

    #[getter]
    fn notes(&self) -> Vec<String> {
        self.codec.notes.clone()
    }

    #[pyo3(signature = (x, *, n_jobs=None, progress=None))]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        x: PyReadonlyArray2<'py, f32>,
        n_jobs: Option<i64>,
        progress: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArray2<u8>>> {
        let x = matrix(&x)?;
        let ctx = Context::new(n_jobs, 0);
        let codes = long(py, &ctx, progress.as_ref(), || {
            x.check_all(&ctx)?;
            self.codec.encode(x, &ctx)
        })?;
        rows(py, codes, self.row_bytes())
    }

    #[pyo3(signature = (codes, *, n_jobs=None))]
    fn decode<'py>(
        &self,
        py: Python<'py>,
        codes: PyReadonlyArray2<'py, u8>,
        n_jobs: Option<i64>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let width = codes.as_array().ncols();
        if width != self.row_bytes() {
            let text = format!("codes have {width} bytes a row, expected {} as from transform", self.row_bytes());
            return Err(PyValueError::new_err(text));
        }
        let codes = codes.as_slice()?;
        let ctx = Context::new(n_jobs, 0);
        let values = long(py, &ctx, None, || {
            for (block, codes) in codes.chunks(BLOCK_ROWS * width.max(1)).enumerate() {
                ctx.check()?;
                if let Some(row) = self.codec.decoder().bad_row(codes) {
                    let found = format!("NaN or infinity in row {}", block * BLOCK_ROWS + row);
                    return Err(Error::shape("codes", found, "codes from transform"));
                }
            }
            self.codec.decode(codes, &ctx)
        })?;
        rows(py, values, self.dim())
    }

    fn description(&self) -> String {
        Value::Object(self.codec.decoder().describe()).to_string()
    }

    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        tensors(py, &self.codec.decoder().tensors())
    }

    fn books<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyArray2<f32>>>> {
        match self.codec.decoder().first() {
            Decoder::Books(books) => {
                books.books().into_iter().map(|(_, width, entries)| rows(py, entries, width)).collect()
            }
            other => Err(PyValueError::new_err(format!("the form {} has no codebooks", other.form()))),
        }
    }

    fn to_parts<'py>(&self, py: Python<'py>) -> PyResult<(String, Bound<'py, PyDict>)> {
        let mut object = Map::new();
        object.insert("kind".into(), self.kind().into());
        object.insert("parameters".into(), Value::Object(self.codec.parameters()));
        object.insert("decoder".into(), Value::Object(self.codec.decoder().describe()));
        object.insert("n_iter".into(), self.codec.n_iter.into());
        object.insert("notes".into(), self.codec.notes.clone().into());
        object.insert("relative_error".into(), self.relative_error.into());
        Ok((Value::Object(object).to_string(), self.tensors(py)?))
    }

    #[staticmethod]
    fn from_parts(description: &str, tensors: &Bound<'_, PyDict>) -> PyResult<Codec> {
        let bad = |why: String| PyValueError::new_err(format!("not the parts of a codec: {why}"));
        let object: Map<String, Value> = serde_json::from_str(description).map_err(|e| bad(e.to_string()))?;
        let part =
            |key: &str| object.get(key).and_then(Value::as_object).cloned().ok_or_else(|| bad(format!("no {key}")));
        let kind = object.get("kind").and_then(Value::as_str).ok_or_else(|| bad("no kind".into()))?;
        let (decoder, tensors) = (part("decoder")?, tensors_from(tensors)?);
        let decoder = short(|| Decoder::from_parts(decoder, &tensors))?;
        let parameters = part("parameters")?;
        let mut codec = short(|| quantizer::Codec::new(kind, parameters, decoder))?;
        codec.n_iter = object.get("n_iter").and_then(Value::as_u64).unwrap_or(0) as usize;
        let notes = object.get("notes").and_then(Value::as_array).cloned().unwrap_or_default();
        codec.notes = notes.iter().filter_map(|n| n.as_str().map(str::to_owned)).collect();
        let error = object.get("relative_error").and_then(Value::as_f64).unwrap_or(f64::NAN);
        Ok(Codec::new(codec, error))
    }
}
