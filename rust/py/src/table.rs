//! Classes `Table` and `TableWriter`.

use crate::address;
use crate::array::{self, checked, matrix, tensors, tensors_from, to_json, view, Rows};
use crate::call::{answering, detached, long, short, watched};
use crate::codec::Codec;
use crate::error::to_py;
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyDict, PyString};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use vqrs_core::decoder::{Decoder, Metric, Segments};
use vqrs_core::error::{reserved, Error};
use vqrs_core::kernels::Ids;
use vqrs_core::pool::Context;
use vqrs_core::table::{self, About, Mode, Pooling, Verify};
use vqrs_core::tensor::Buffer;
use vqrs_core::{quantizer, search, stream};

/// Values below which a call keeps the GIL: giving it back costs as much as the work.
const SHORT: usize = 1 << 14;

/// Values above which another thread does the work, so that this one answers Ctrl-C in all of it.
const LONG: usize = 1 << 24;

/// Names between two looks at whether there is memory for as many more, and the bytes that are looked for.
const NAMES_AT_ONCE: usize = 4096;
const NAMES_ROOM: usize = 16 << 20;

/// Most bytes of metadata: they stand in the header, which has no more.
const MAX_METADATA: usize = 16 << 20;

/// A decoder with its codes, in memory or mapped.
#[pyclass(frozen, module = "vqrs._core")]
pub struct Table {
    inner: RwLock<Option<Arc<table::Table>>>,
}

/// The context of a call for so many values.
fn context(n_jobs: Option<i64>, values: usize) -> Context {
    let ctx = Context::new(n_jobs, 0);
    match values {
        SHORT..LONG => watched(ctx),
        _ => ctx,
    }
}

/// Runs short work at once, longer work without the GIL, and long work so that Ctrl-C is answered.
fn run(
    py: Python<'_>,
    values: usize,
    ctx: &Context,
    work: impl FnOnce() -> vqrs_core::Result<()> + Send,
) -> PyResult<()> {
    match values {
        ..SHORT => short(work),
        SHORT..LONG => answering(py, work),
        _ => long(py, ctx, None, work),
    }
}

/// Fails where the table's file was found cut.
fn intact(table: &table::Table) -> PyResult<()> {
    table.watch();
    short(|| table.intact())
}

/// Whether all ids are rows; `Some` with negative ones counted from the end, where that is allowed and there were any.
fn rows_of(ids: Ids<'_>, table: &table::Table, from_end: bool) -> vqrs_core::Result<Option<Vec<i64>>> {
    let wrapped = table::check_ids(ids, table.rows())?;
    let negative = |position: &usize| match ids {
        Ids::I32(ids) => ids[*position] < 0,
        Ids::I64(ids) => ids[*position] < 0,
        Ids::Range { .. } => false,
    };
    if let (Some(wrapped), false) = (&wrapped, from_end) {
        if let Some(position) = (0..ids.len()).find(negative) {
            let (id, rows) = (wrapped[position] - table.rows() as i64, table.rows());
            return Err(Error::Id { id, position, rows });
        }
    }
    Ok(wrapped)
}

fn pooling(mode: &str) -> PyResult<Pooling> {
    match mode {
        "sum" => Ok(Pooling::Sum),
        "mean" => Ok(Pooling::Mean),
        "max" => Ok(Pooling::Max),
        other => Err(to_py(Error::parameter("mode", format!("{other:?}"), "must be sum, mean or max"))),
    }
}

/// Names of rows.
fn texts(names: &Bound<'_, PyAny>, most: Option<usize>) -> PyResult<Vec<String>> {
    if names.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err("names must be a sequence of strings, one a row, not one string"));
    }
    let mut all = Vec::new();
    for (row, name) in names.try_iter()?.enumerate() {
        let name = name?;
        // Before more are read than there can be, or than there is memory for.
        if let Some(most) = most.filter(|most| row >= *most) {
            let expected = format!("one for each of the {most} rows");
            return Err(to_py(Error::shape("names", format!("more than {most} names"), expected)));
        }
        if row % NAMES_AT_ONCE == 0 {
            checked(reserved::<u8>("names", Some(NAMES_ROOM)))?;
            checked(all.try_reserve(NAMES_AT_ONCE).map_err(|_| Error::Memory { what: "names", bytes: row * 24 }))?;
        }
        let text = name.extract::<PyBackedStr>().map_err(|_| {
            let found = name.get_type().name().map_or_else(|_| "something else".into(), |name| name.to_string());
            PyTypeError::new_err(format!("names[{row}] is of type {found}, expected a string"))
        })?;
        all.push(array::text(&text)?);
    }
    Ok(all)
}

fn strings(metadata: Option<&Bound<'_, PyAny>>) -> PyResult<BTreeMap<String, String>> {
    let (mut map, mut size) = (BTreeMap::new(), 0usize);
    for (key, value) in metadata.map(to_json).transpose()?.unwrap_or_default() {
        match value {
            Value::String(text) => {
                size = size.saturating_add(key.len()).saturating_add(text.len());
                map.insert(key, text)
            }
            other => {
                return Err(PyTypeError::new_err(format!("metadata[{key:?}] is {other}, expected a string")));
            }
        };
    }
    // Before it is copied into a description, whose size is known only once it is whole.
    if size > MAX_METADATA {
        let expected = "at most 16 MiB: keep long texts beside the table";
        return Err(to_py(Error::parameter("metadata", format!("{size} bytes"), expected)));
    }
    Ok(map)
}

impl Table {
    fn of(table: table::Table) -> Self {
        Table { inner: RwLock::new(Some(Arc::new(table))) }
    }

    fn get(&self) -> PyResult<Arc<table::Table>> {
        let guard = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        guard.clone().ok_or_else(|| to_py(Error::Closed))
    }
}

#[pymethods]
impl Table {
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf, verify: &str, mode: &str) -> PyResult<Self> {
        let verify = match verify {
            "header" => Verify::Header,
            "lazy" => Verify::Lazy,
            "full" => Verify::Full,
            other => {
                return Err(to_py(Error::parameter("verify", format!("{other:?}"), "must be header, lazy or full")))
            }
        };
        let mode = match mode {
            "mmap" => Mode::Mmap,
            "read" => Mode::Read,
            other => return Err(to_py(Error::parameter("mode", format!("{other:?}"), "must be mmap or read"))),
        };
        let ctx = Context::new(None, 0);
        let open = || table::Table::open_with(&path, verify, mode, &ctx);
        let whole = verify == Verify::Full || mode == Mode::Read;
        Ok(Table::of(if whole { long(py, &ctx, None, open)? } else { detached(py, open)? }))
    }

    #[staticmethod]
    #[pyo3(signature = (codec, codes, *, errors, names=None, metadata=None))]
    fn from_codec(
        py: Python<'_>,
        codec: &Codec,
        codes: PyReadonlyArray2<'_, u8>,
        errors: &Bound<'_, PyAny>,
        names: Option<&Bound<'_, PyAny>>,
        metadata: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let (rows, width) = (codes.as_array().nrows(), codes.as_array().ncols());
        let codec = &codec.codec;
        if width != codec.decoder().row_bytes() {
            let found = format!("{width} bytes a row");
            return Err(to_py(Error::shape("codes", found, format!("{}", codec.decoder().row_bytes()))));
        }
        let names = names.map(|names| texts(names, Some(rows))).transpose()?;
        let (codes, errors, metadata) = (codes.as_slice()?, to_json(errors)?, strings(metadata)?);
        let table = detached(py, || {
            let about =
                About { kind: codec.kind().into(), parameters: codec.parameters(), errors, metadata: metadata.clone() };
            let table = table::Table::new(codec.decoder().clone(), Buffer::copy_of(codes)?, rows, about)?;
            table.with_metadata(names.as_deref(), metadata)
        })?;
        Ok(Table::of(table))
    }

    #[staticmethod]
    #[pyo3(signature = (description, tensors, codes, *, errors, names=None, metadata=None, borrow=false))]
    fn from_parts(
        py: Python<'_>,
        description: &str,
        tensors: &Bound<'_, PyDict>,
        codes: &Bound<'_, PyArray2<u8>>,
        errors: &Bound<'_, PyAny>,
        names: Option<&Bound<'_, PyAny>>,
        metadata: Option<&Bound<'_, PyAny>>,
        borrow: bool,
    ) -> PyResult<Self> {
        let bad = |why: String| PyValueError::new_err(format!("not the description of a table: {why}"));
        let object: Map<String, Value> = serde_json::from_str(description).map_err(|e| bad(e.to_string()))?;
        let part =
            |key: &str| object.get(key).and_then(Value::as_object).cloned().ok_or_else(|| bad(format!("no {key}")));
        let kind = object.get("kind").and_then(Value::as_str).ok_or_else(|| bad("no kind".into()))?;
        let (decoder, tensors) = (part("decoder")?, tensors_from(tensors)?);
        let decoder = short(|| Decoder::from_parts(decoder, &tensors))?;
        let held = borrow.then(|| address::borrow(codes)).transpose()?;
        let codes = codes.try_readonly()?;
        let (rows, codes) = (codes.as_array().nrows(), codes.as_slice()?);
        let (names, metadata) = (names.map(|names| texts(names, Some(rows))).transpose()?, strings(metadata)?);
        let about = About {
            kind: kind.into(),
            parameters: part("parameters")?,
            errors: to_json(errors)?,
            metadata: metadata.clone(),
        };
        let table = detached(py, || {
            let codes = held.map_or_else(|| Buffer::copy_of(codes), Ok)?;
            let table = table::Table::new(decoder, codes, rows, about)?;
            table.with_metadata(names.as_deref(), metadata)
        })?;
        Ok(Table::of(table))
    }

    #[staticmethod]
    #[pyo3(signature = (codecs, codes, group_of, *, kind, parameters, errors, names=None, metadata=None))]
    fn from_groups(
        py: Python<'_>,
        codecs: Vec<PyRef<'_, Codec>>,
        codes: Vec<PyReadonlyArray2<'_, u8>>,
        group_of: PyReadonlyArray1<'_, u8>,
        kind: &str,
        parameters: &Bound<'_, PyAny>,
        errors: &Bound<'_, PyAny>,
        names: Option<&Bound<'_, PyAny>>,
        metadata: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let decoders = codecs.iter().map(|codec| codec.codec.decoder().clone()).collect();
        let group_of = group_of.as_slice()?;
        let segments = short(|| Segments::new(decoders, group_of))?;
        // Rounded up to whole rows.
        let mut all = checked(reserved("the codes", segments.code_bytes().checked_add(segments.rows())))?;
        for ((range, decoder), codes) in segments.groups().zip(&codes) {
            if codes.as_slice()?.len() != range.len() || codes.as_array().ncols() != decoder.row_bytes() {
                let expected = format!("{} bytes in rows of {}", range.len(), decoder.row_bytes());
                return Err(to_py(Error::shape("codes", format!("{} bytes", codes.as_slice()?.len()), expected)));
            }
            all.extend_from_slice(codes.as_slice()?);
        }
        let (rows, decoder) = (segments.rows(), Decoder::Segments(segments));
        all.resize(rows * decoder.row_bytes(), 0);
        let names = names.map(|names| texts(names, Some(rows))).transpose()?;
        let (errors, metadata) = (to_json(errors)?, strings(metadata)?);
        let about = About { kind: kind.into(), parameters: to_json(parameters)?, errors, metadata: metadata.clone() };
        let table = detached(py, || {
            let table = table::Table::new(decoder, Buffer::copy_of(&all)?, rows, about)?;
            table.with_metadata(names.as_deref(), metadata)
        })?;
        Ok(Table::of(table))
    }

    fn with_tensors(&self, tensors: &Bound<'_, PyDict>) -> PyResult<Self> {
        let (table, tensors) = (self.get()?, tensors_from(tensors)?);
        Ok(Table::of(short(|| table.with_tensors(&tensors))?))
    }

    #[pyo3(signature = (names, metadata))]
    fn with_metadata(&self, names: Option<&Bound<'_, PyAny>>, metadata: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (table, metadata) = (self.get()?, strings(Some(metadata))?);
        let names = names.map(|names| texts(names, Some(table.rows()))).transpose()?;
        Ok(Table::of(short(|| table.with_metadata(names.as_deref(), metadata))?))
    }

    #[getter]
    fn n_rows(&self) -> PyResult<usize> {
        Ok(self.get()?.rows())
    }

    #[getter]
    fn dim(&self) -> PyResult<usize> {
        Ok(self.get()?.dim())
    }

    #[getter]
    fn row_bytes(&self) -> PyResult<usize> {
        Ok(self.get()?.row_bytes())
    }

    #[getter]
    fn kind(&self) -> PyResult<String> {
        Ok(self.get()?.about().kind.clone())
    }

    #[getter]
    fn form(&self) -> PyResult<&'static str> {
        Ok(self.get()?.decoder().form())
    }

    #[getter]
    fn nbytes(&self) -> PyResult<u64> {
        let table = self.get()?;
        short(|| table.nbytes())
    }

    #[getter]
    fn path(&self) -> PyResult<Option<OsString>> {
        Ok(self.get()?.file().map(|file| file.path().as_os_str().to_owned()))
    }

    #[getter]
    fn mapped(&self) -> PyResult<bool> {
        Ok(self.get()?.file().is_some_and(|file| file.is_mapped()))
    }

    #[getter]
    fn closed(&self) -> bool {
        self.get().is_err()
    }

    #[getter]
    fn relative_error(&self) -> PyResult<f64> {
        Ok(self.get()?.about().errors.get("relative").and_then(Value::as_f64).unwrap_or(f64::NAN))
    }

    #[getter]
    fn metadata(&self) -> PyResult<BTreeMap<String, String>> {
        Ok(self.get()?.about().metadata.clone())
    }

    fn names(&self) -> PyResult<Option<Vec<String>>> {
        let table = self.get()?;
        short(|| table.names())
    }

    fn find(&self, name: &str) -> PyResult<Option<usize>> {
        let table = self.get()?;
        short(|| table.find(name))
    }

    fn codec(&self) -> PyResult<Codec> {
        let table = self.get()?;
        let about = table.about();
        if !table.decoder().rows_apart() {
            let text = "a table of groups has a codec for each of them and none for all: encode with the quantizer";
            return Err(PyValueError::new_err(text));
        }
        let codec = short(|| quantizer::Codec::new(&about.kind, about.parameters.clone(), table.own_decoder()?))?;
        Ok(Codec::new(codec, self.relative_error()?))
    }

    fn info(&self) -> PyResult<String> {
        Ok(Value::Object(self.get()?.info()).to_string())
    }

    #[pyo3(signature = (ids, out=None, n_jobs=None, dtype=None))]
    fn lookup<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
        n_jobs: Option<i64>,
        dtype: Option<&str>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let table = self.get()?;
        let Some(array) = array::Ids::new(ids)? else { return Ok(None) };
        let shape = array.shape_of_rows(table.dim());
        let Some(rows) = Rows::new(py, out, &shape, dtype)? else { return Ok(None) };
        let ids = array.get()?;
        let values = ids.len().saturating_mul(table.dim());
        let ctx = context(n_jobs, values);
        rows.fill(|out| {
            run(py, values, &ctx, || {
                let wrapped = rows_of(ids, &table, true)?;
                table.lookup(wrapped.as_deref().map_or(ids, Ids::I64), out, &ctx)
            })
        })?;
        Ok(Some(rows.into_any()))
    }

    #[pyo3(signature = (start, stop, out=None, n_jobs=None, dtype=None))]
    fn decode<'py>(
        &self,
        py: Python<'py>,
        start: usize,
        stop: usize,
        out: Option<&Bound<'py, PyAny>>,
        n_jobs: Option<i64>,
        dtype: Option<&str>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let table = self.get()?;
        if start > stop || stop > table.rows() {
            let text = format!("rows {start} to {stop} are not inside a table of {} rows", table.rows());
            return Err(pyo3::exceptions::PyIndexError::new_err(text));
        }
        let len = stop - start;
        let Some(rows) = Rows::new(py, out, &[len, table.dim()], dtype)? else { return Ok(None) };
        let values = len.saturating_mul(table.dim());
        let ctx = context(n_jobs, values);
        rows.fill(|out| run(py, values, &ctx, || table.lookup(Ids::Range { start, len }, out, &ctx)))?;
        Ok(Some(rows.into_any()))
    }

    #[pyo3(signature = (ids, offsets, weights, mode, out=None, n_jobs=None, dtype=None))]
    fn pool<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        offsets: PyReadonlyArray1<'py, i64>,
        weights: Option<PyReadonlyArray1<'py, f32>>,
        mode: &str,
        out: Option<&Bound<'py, PyAny>>,
        n_jobs: Option<i64>,
        dtype: Option<&str>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let pooling = pooling(mode)?;
        let table = self.get()?;
        let Some(array) = array::Ids::new(ids)? else { return Ok(None) };
        let (ids, offsets) = (array.get()?, offsets.as_slice()?);
        let weights = weights.as_ref().map(|w| w.as_slice()).transpose()?;
        let Some(rows) = Rows::new(py, out, &[offsets.len(), table.dim()], dtype)? else { return Ok(None) };
        let values = ids.len().saturating_add(offsets.len()).saturating_mul(table.dim());
        let ctx = context(n_jobs, values);
        rows.fill(|out| {
            run(py, values, &ctx, || {
                let wrapped = rows_of(ids, &table, true)?;
                let ids = wrapped.as_deref().map_or(ids, Ids::I64);
                table.pool(ids, offsets, weights, pooling, out, &ctx)
            })
        })?;
        Ok(Some(rows.into_any()))
    }

    #[pyo3(signature = (ids, count, wide, out, dtype, threads))]
    fn lookup_at(
        &self,
        py: Python<'_>,
        ids: usize,
        count: usize,
        wide: bool,
        out: usize,
        dtype: &str,
        threads: usize,
    ) -> PyResult<()> {
        let table = self.get()?;
        let ids = address::ids(ids, count, wide)?;
        let values = count.saturating_mul(table.dim());
        let out = address::output(out, values, dtype)?;
        let ctx = context(None, values).at_most(threads);
        run(py, values, &ctx, || {
            rows_of(ids, &table, false)?;
            table.lookup(ids, out, &ctx)
        })
    }

    #[pyo3(signature = (ids, count, wide, offsets, bags, weights, mode, out, dtype, threads))]
    fn pool_at(
        &self,
        py: Python<'_>,
        ids: usize,
        count: usize,
        wide: bool,
        offsets: Option<usize>,
        bags: usize,
        weights: Option<usize>,
        mode: &str,
        out: usize,
        dtype: &str,
        threads: usize,
    ) -> PyResult<()> {
        let (table, pooling) = (self.get()?, pooling(mode)?);
        let ids = address::ids(ids, count, wide)?;
        let equal: Vec<i64>;
        let offsets = match offsets {
            Some(offsets) => address::values(offsets, bags)?,
            None => {
                let size = count / bags.max(1);
                equal = (0..bags).map(|bag| (bag * size) as i64).collect();
                &equal
            }
        };
        let weights = weights.map(|weights| address::values(weights, count)).transpose()?;
        let out = address::output(out, bags.saturating_mul(table.dim()), dtype)?;
        let values = count.saturating_add(bags).saturating_mul(table.dim());
        let ctx = context(None, values).at_most(threads);
        run(py, values, &ctx, || {
            rows_of(ids, &table, false)?;
            table.pool(ids, offsets, weights, pooling, out, &ctx)
        })
    }

    #[pyo3(signature = (queries, k, metric, n_jobs=None))]
    #[allow(clippy::type_complexity)]
    fn search<'py>(
        &self,
        py: Python<'py>,
        queries: PyReadonlyArray2<'py, f32>,
        k: i64,
        metric: &str,
        n_jobs: Option<i64>,
    ) -> PyResult<(Bound<'py, PyArray2<f32>>, Bound<'py, PyArray2<i64>>)> {
        let metric = match metric {
            "inner_product" => Metric::InnerProduct,
            "l2" => Metric::L2,
            "cosine" => Metric::Cosine,
            other => {
                let expected = "must be inner_product, l2 or cosine";
                return Err(to_py(Error::parameter("metric", format!("{other:?}"), expected)));
            }
        };
        let k = usize::try_from(k).map_err(|_| to_py(Error::parameter("k", k, "must be at least 1")))?;
        let table = self.get()?;
        let count = queries.as_array().nrows();
        let queries = matrix(&queries)?;
        let ctx = Context::new(n_jobs, 0);
        let (scores, ids) = long(py, &ctx, None, || search::search(&table, queries, k, metric, &ctx))?;
        let shape = [count, k.min(table.rows())];
        Ok((PyArray1::from_vec(py, scores).reshape(shape)?, PyArray1::from_vec(py, ids).reshape(shape)?))
    }

    fn codes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let table = self.get()?;
        intact(&table)?;
        view(py, table.code_buffer(), vqrs_core::tensor::Dtype::U8, &[table.rows(), table.row_bytes()])
    }

    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let table = self.get()?;
        intact(&table)?;
        tensors(py, &table.decoder().tensors())
    }

    fn intact(&self) -> PyResult<()> {
        let table = self.get()?;
        intact(&table)
    }

    #[pyo3(signature = (path, *, durable=true, n_jobs=None))]
    fn save(&self, py: Python<'_>, path: PathBuf, durable: bool, n_jobs: Option<i64>) -> PyResult<u64> {
        let table = self.get()?;
        let ctx = Context::new(n_jobs, 0);
        long(py, &ctx, None, || table.save(&path, durable, &ctx))
    }

    #[pyo3(signature = (n_jobs=None))]
    fn verify(&self, py: Python<'_>, n_jobs: Option<i64>) -> PyResult<()> {
        let table = self.get()?;
        let ctx = Context::new(n_jobs, 0);
        long(py, &ctx, None, || table.verify(&ctx))
    }

    fn close(&self) {
        *self.inner.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Streams a table to a file in bounded memory.
#[pyclass(frozen, module = "vqrs._core")]
pub struct TableWriter {
    inner: Mutex<Option<stream::TableWriter>>,
    dim: usize,
}

impl TableWriter {
    fn take(&self) -> PyResult<stream::TableWriter> {
        let mut guard = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        guard
            .take()
            .ok_or_else(|| PyValueError::new_err("the writer is finished, was stopped by an error, or is in use"))
    }
}

#[pymethods]
impl TableWriter {
    #[new]
    #[pyo3(signature = (path, codec, *, names=None, metadata=None, durable=true))]
    fn new(
        path: PathBuf,
        codec: &Codec,
        names: Option<&Bound<'_, PyAny>>,
        metadata: Option<&Bound<'_, PyAny>>,
        durable: bool,
    ) -> PyResult<Self> {
        let names = names.map(|names| texts(names, None)).transpose()?;
        let dim = codec.codec.decoder().dim();
        let path: &Path = &path;
        let metadata = strings(metadata)?;
        let create = || stream::TableWriter::create(path, codec.codec.clone(), names.as_deref(), metadata, durable);
        Ok(TableWriter { inner: Mutex::new(Some(short(create)?)), dim })
    }

    #[pyo3(signature = (x, *, sample_weight=None, n_jobs=None, progress=None))]
    fn write<'py>(
        &self,
        py: Python<'py>,
        x: PyReadonlyArray2<'py, f32>,
        sample_weight: Option<PyReadonlyArray1<'py, f64>>,
        n_jobs: Option<i64>,
        progress: Option<Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let x = matrix(&x)?;
        let weights = sample_weight.as_ref().map(|w| w.as_slice()).transpose()?;
        if weights.is_some_and(|w| w.len() != x.rows()) || x.dim() != self.dim {
            let text = format!(
                "a block of {} rows of {} features, expected {} features and a weight a row",
                x.rows(),
                x.dim(),
                self.dim
            );
            return Err(PyValueError::new_err(text));
        }
        let ctx = Context::new(n_jobs, 0);
        // Taken while at work: an error leaves the writer stopped and its temporary file removed.
        let mut writer = self.take()?;
        let work_ctx = &ctx;
        let writer = long(py, &ctx, progress.as_ref(), move || {
            writer.write(x, weights, work_ctx)?;
            Ok(writer)
        })?;
        *self.inner.lock().unwrap_or_else(PoisonError::into_inner) = Some(writer);
        Ok(())
    }

    #[pyo3(signature = (errors=None))]
    fn finish(&self, py: Python<'_>, errors: Option<&Bound<'_, PyAny>>) -> PyResult<u64> {
        let errors: Map<String, Value> = errors.map(to_json).transpose()?.unwrap_or_default();
        let writer = self.take()?;
        detached(py, move || writer.finish(errors))
    }

    fn abort(&self) {
        drop(self.take());
    }
}
