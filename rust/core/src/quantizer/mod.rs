//! How codes are learned: an open set of quantizers, listed once in [`KINDS`].
//!
//! A quantizer is its parameters, with `fit` and an encoder. It keeps no fitted state: everything that reading needs
//! goes into a [`Decoder`], and everything after fitting needs only that.

mod additive;
mod deduplicating;
mod front;
mod kmeans;
mod low_rank;
mod optimized_product;
mod product;
mod product_residual;
mod residual;
mod rotated;
mod scalar;
mod scales;
mod sparse;
mod tree;
mod trellis;

use crate::algo::nearest::{Centroids, Columns, Parts};
use crate::bits;
use crate::decoder::{Decoder, GroupSpec};
use crate::error::{Error, Result};
use crate::kernels::Ids;
use crate::matrix::{check_weights, Matrix, Sample};
use crate::pool::Context;
use front::{Front, Fronted, Turning};
use serde::de::DeserializeOwned;
use serde::Serialize;
use serde_json::{Map, Value};
use std::sync::Arc;

/// Every kind of quantizer, in the order of the documentation.
pub const KINDS: &[Kind] = &[
    kind::<kmeans::VectorQuantizer>(),
    kind::<product::ProductQuantizer>(),
    kind::<optimized_product::OptimizedProductQuantizer>(),
    kind::<residual::ResidualQuantizer>(),
    kind::<product_residual::ProductResidualQuantizer>(),
    kind::<additive::AdditiveQuantizer>(),
    kind::<tree::TreeQuantizer>(),
    kind::<scalar::ScalarQuantizer>(),
    kind::<low_rank::LowRankQuantizer>(),
    kind::<trellis::TrellisQuantizer>(),
    kind::<rotated::RotatedQuantizer>(),
    kind::<sparse::SparseQuantizer>(),
    kind::<deduplicating::DeduplicatingQuantizer>(),
];

/// Rows that are encoded at a time; also the unit of parallel work.
pub const BLOCK_ROWS: usize = 256;

/// Writes the codes of a block of rows.
pub type Encoder<'a> = Box<dyn Fn(Matrix, &mut [u8]) -> Result<()> + Sync + 'a>;

/// What a fit found.
pub struct Learned {
    /// How to read codes.
    pub decoder: Decoder,
    /// Codes of the fitted rows, where the fit found some that a fresh encode may not.
    pub codes: Option<Vec<u8>>,
    /// Iterations of the longest inner loop.
    pub n_iter: usize,
    /// What had to be shrunk, in words for the user.
    pub notes: Vec<String>,
}

/// A way to learn codes. Implementors are plain parameters with the names and defaults that users see.
pub trait Quantizer: Serialize + DeserializeOwned + Default + Send + Sync + 'static {
    /// Its name in Rust, on the command line and in files.
    const NAME: &'static str;
    /// One line for the documentation.
    const ABOUT: &'static str;
    /// Defaults of the parameters that all kinds share.
    const FRONT: Front = Front::NONE;

    /// Refuses parameters that are never allowed.
    fn check(&self) -> Result<()>;

    /// The decoder that a fit on `rows` rows of `dim` values has, its numbers aside: what `estimate` measures.
    fn blank(&self, rows: usize, dim: usize) -> Result<Decoder>;

    /// Learns a decoder.
    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned>;

    /// Prepares encoding with a decoder that `fit` made.
    fn encoder<'a>(&'a self, decoder: &'a Decoder, ctx: &Context) -> Result<Encoder<'a>>;

    /// The rotation that `rotation="auto"` stands for.
    fn usual_rotation(&self) -> Option<Turning> {
        None
    }

    /// Most principal components that the quantizer takes of rows of `dim` columns.
    fn columns(&self, dim: usize) -> usize {
        dim
    }

    /// The principal components that it takes, in the order in which it wants them; `variances` fall.
    fn components(&self, variances: &[f64]) -> Vec<usize> {
        (0..self.columns(variances.len())).collect()
    }

    /// [`Quantizer::fit`] where the columns are some components of rows of `dim` columns.
    fn fit_components(&self, data: Sample, _dim: usize, ctx: &Context) -> Result<Learned> {
        self.fit(data, ctx)
    }

    /// The rows of the rotation after which its error is least: for `rotation="learned"`.
    fn learn_rotation(&self, _: Sample, _: &Context) -> Result<Vec<f32>> {
        Err(Error::parameter("rotation", "'learned'", format!("the kind {} learns no rotation", Self::NAME)))
    }
}

/// [`Quantizer`] for any kind at run time.
pub trait AnyQuantizer: Send + Sync {
    /// See [`Quantizer::blank`].
    fn blank(&self, rows: usize, dim: usize) -> Result<Decoder>;
    /// See [`Quantizer::fit`].
    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned>;
    /// See [`Quantizer::encoder`].
    fn encoder<'a>(&'a self, decoder: &'a Decoder, ctx: &Context) -> Result<Encoder<'a>>;
    /// The parameters, defaults filled in.
    fn parameters(&self) -> Map<String, Value>;
}

type Make = fn(Map<String, Value>) -> Result<Arc<dyn AnyQuantizer>>;

/// One line of [`KINDS`].
pub struct Kind {
    /// The name.
    pub name: &'static str,
    /// One line for the documentation.
    pub about: &'static str,
    make: Make,
}

impl Kind {
    /// The kind of a name.
    pub fn find(name: &str) -> Result<&'static Kind> {
        KINDS.iter().find(|kind| kind.name == name).ok_or_else(|| {
            let known: Vec<&str> = KINDS.iter().map(|kind| kind.name).collect();
            Error::UnknownKind { name: name.into(), known: known.join(", ") }
        })
    }

    /// A quantizer with these parameters; the others keep their defaults. Unknown names are refused.
    pub fn make(&self, parameters: Map<String, Value>) -> Result<Arc<dyn AnyQuantizer>> {
        (self.make)(parameters)
    }
}

const fn kind<Q: Quantizer>() -> Kind {
    Kind { name: Q::NAME, about: Q::ABOUT, make: make::<Q> }
}

fn make<Q: Quantizer>(parameters: Map<String, Value>) -> Result<Arc<dyn AnyQuantizer>> {
    let (front, own) = Front::split(parameters);
    let (front, quantizer) = (read::<Front>(Q::NAME, &Q::FRONT, front, &own)?, Q::default());
    let quantizer = read::<Q>(Q::NAME, &quantizer, own, &Map::new())?;
    quantizer.check()?;
    Ok(Arc::new(Fronted::new(front, quantizer)?))
}

/// Parameters over their defaults. `others` are named where one is unknown.
fn read<P: Serialize + DeserializeOwned>(
    kind: &str,
    defaults: &P,
    given: Map<String, Value>,
    others: &Map<String, Value>,
) -> Result<P> {
    let Ok(Value::Object(mut all)) = serde_json::to_value(defaults) else {
        return Err(Error::parameter("parameters", kind, "could not be written"));
    };
    for (name, value) in given {
        if !all.contains_key(&name) {
            let known: Vec<&str> = all.keys().chain(others.keys()).map(String::as_str).collect();
            return Err(Error::parameter(&name, value, format!("{kind} takes {}", known.join(", "))));
        }
        // One at a time, so that the message names the parameter.
        let default = all.insert(name.clone(), value.clone()).unwrap_or_default();
        serde_json::from_value::<P>(Value::Object(all.clone()))
            .map_err(|e| Error::parameter(&name, shown(&value), expected(&default, &e)))?;
    }
    serde_json::from_value(Value::Object(all)).map_err(|e| Error::parameter("parameters", kind, e.to_string()))
}

/// A value as Python writes it: JSON has no NaN and no infinity.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "None, NaN or infinity".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        other => other.to_string(),
    }
}

/// What a parameter takes, as its default shows.
fn expected(default: &Value, error: &serde_json::Error) -> String {
    match default {
        Value::Number(number) if number.is_u64() => "must be an integer, 0 or more".into(),
        Value::Number(_) => "must be a finite number".into(),
        Value::Bool(_) => "must be True or False".into(),
        // Names of the choices.
        _ => error.to_string(),
    }
}

/// A quantizer with the decoder it learned: can encode new rows.
#[derive(Clone)]
pub struct Codec {
    kind: &'static Kind,
    quantizer: Arc<dyn AnyQuantizer>,
    decoder: Decoder,
    /// Iterations of the fit's longest inner loop.
    pub n_iter: usize,
    /// What the fit had to shrink.
    pub notes: Vec<String>,
}

impl Codec {
    /// A codec from its parts, for example those of an opened table.
    pub fn new(kind: &str, parameters: Map<String, Value>, decoder: Decoder) -> Result<Self> {
        let kind = Kind::find(kind)?;
        if !decoder.rows_apart() {
            return Err(Error::shape("the decoder", decoder.form(), "a form whose rows stand apart"));
        }
        if decoder.row_bytes() == 0 {
            return Err(Error::shape("the decoder", decoder.form(), "a form that keeps codes"));
        }
        Ok(Codec { kind, quantizer: kind.make(parameters)?, decoder, n_iter: 0, notes: Vec::new() })
    }

    /// Learns from `data`. Returns the codec with the codes of `data`: those that [`Codec::encode`] gives, or, with
    /// `keep_better`, a row's code from the fit where that has the smaller error.
    pub fn fit(
        kind: &str,
        parameters: Map<String, Value>,
        data: Sample,
        keep_better: bool,
        ctx: &Context,
    ) -> Result<(Self, Vec<u8>)> {
        let kind = Kind::find(kind)?;
        let quantizer = kind.make(parameters)?;
        let learned = quantizer.fit(data, ctx)?;
        let Learned { decoder, codes: found, n_iter, notes } = learned;
        let codec = Codec { kind, quantizer, decoder, n_iter, notes };
        let mut codes = codec.encode(data.rows, ctx)?;
        if let Some(found) = found.filter(|_| keep_better) {
            codec.keep_better(data.rows, &mut codes, &found, ctx)?;
        }
        Ok((codec, codes))
    }

    /// The kind's name.
    pub fn kind(&self) -> &'static str {
        self.kind.name
    }

    /// All parameters.
    pub fn parameters(&self) -> Map<String, Value> {
        self.quantizer.parameters()
    }

    /// How codes are read.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Codes of rows. Rows are not checked for NaN: see [`Matrix::check`].
    pub fn encode(&self, rows: Matrix, ctx: &Context) -> Result<Vec<u8>> {
        if rows.dim() != self.decoder.dim() {
            let expected = format!("{} features, as in the fit", self.decoder.dim());
            return Err(Error::shape("X", format!("{} features", rows.dim()), expected));
        }
        let bytes = self.decoder.row_bytes();
        let mut codes = crate::error::zeros("the codes", rows.rows().checked_mul(bytes))?;
        let encode = self.quantizer.encoder(&self.decoder, ctx)?;
        ctx.stage("encode", rows.rows() as u64);
        ctx.chunks(&mut codes, BLOCK_ROWS * bytes, |index, chunk| {
            let start = index * BLOCK_ROWS;
            let count = chunk.len() / bytes;
            encode(rows.block(start..start + count), chunk)?;
            ctx.advance(count as u64);
            Ok(())
        })?;
        Ok(codes)
    }

    /// Decodes whole rows of codes.
    pub fn decode(&self, codes: &[u8], ctx: &Context) -> Result<Vec<f32>> {
        let bytes = self.decoder.row_bytes();
        if !codes.len().is_multiple_of(bytes) {
            return Err(Error::shape("codes", format!("{} bytes", codes.len()), format!("rows of {bytes} bytes")));
        }
        let rows = codes.len() / bytes;
        let mut out = crate::error::zeros("the rows", rows.checked_mul(self.decoder.dim()))?;
        ctx.chunks(&mut out, BLOCK_ROWS * self.decoder.dim(), |index, chunk| {
            let range = Ids::Range { start: index * BLOCK_ROWS, len: chunk.len() / self.decoder.dim() };
            self.decoder.decode(codes, range, chunk);
            Ok(())
        })?;
        Ok(out)
    }

    /// Replaces codes by `found` in rows where that lowers the error.
    fn keep_better(&self, rows: Matrix, codes: &mut [u8], found: &[u8], ctx: &Context) -> Result<()> {
        let bytes = self.decoder.row_bytes();
        ctx.chunks(codes, BLOCK_ROWS * bytes, |index, chunk| {
            let start = index * BLOCK_ROWS;
            let count = chunk.len() / bytes;
            let (mut ours, mut theirs) = (vec![0f32; count * rows.dim()], vec![0f32; count * rows.dim()]);
            self.decoder.decode(chunk, Ids::Range { start: 0, len: count }, &mut ours);
            self.decoder.decode(found, Ids::Range { start, len: count }, &mut theirs);
            for row in 0..count {
                let (x, at) = (rows.row(start + row), row * rows.dim()..(row + 1) * rows.dim());
                if squared_distance(x, &theirs[at.clone()]) < squared_distance(x, &ours[at]) {
                    let from = (start + row) * bytes;
                    chunk[row * bytes..(row + 1) * bytes].copy_from_slice(&found[from..from + bytes]);
                }
            }
            Ok(())
        })
    }
}

/// Sums for the relative errors of a table. Rows are added one after the other, so that it does not matter how they are
/// cut into blocks.
#[derive(Clone, Debug, Default)]
pub struct ErrorSums {
    rows: f64,
    error: f64,
    energy: f64,
    weighted_error: f64,
    weighted_energy: f64,
    /// The first row: what others are compared with, so that rows far from zero but close together lose no digits.
    first: Vec<f32>,
    /// Sums of each column's differences from the first row, and of their squares.
    columns: Vec<(f64, f64)>,
}

/// Columns that one task adds up.
const SUM_COLUMNS: usize = 64;

impl ErrorSums {
    /// Adds rows with their codes; `decoder` says what they became.
    pub fn add(
        &mut self,
        rows: Matrix,
        codes: &[u8],
        weights: Option<&[f64]>,
        decoder: &Decoder,
        ctx: &Context,
    ) -> Result<()> {
        weights.map_or(Ok(()), check_weights)?;
        let dim = rows.dim();
        let mut parts: Vec<(f64, f64)> = crate::error::zeros("the errors of rows", Some(rows.rows()))?;
        ctx.chunks(&mut parts, BLOCK_ROWS, |index, parts| {
            let start = index * BLOCK_ROWS;
            let mut decoded = vec![0f32; parts.len() * dim];
            decoder.decode(codes, Ids::Range { start, len: parts.len() }, &mut decoded);
            for (row, (part, decoded)) in parts.iter_mut().zip(decoded.chunks(dim)).enumerate() {
                let x = rows.row(start + row);
                *part = (squared_distance(x, decoded), squared_norm(x));
            }
            Ok(())
        })?;
        for (row, (error, energy)) in parts.into_iter().enumerate() {
            let weight = weights.map_or(1.0, |w| w[row]);
            self.error += error;
            self.energy += energy;
            self.weighted_error += weight * error;
            self.weighted_energy += weight * energy;
        }
        self.rows += rows.rows() as f64;
        self.columns.resize(dim, (0.0, 0.0));
        if self.first.is_empty() {
            self.first.extend(rows.data().iter().take(dim));
        }
        let first = &self.first;
        ctx.chunks(&mut self.columns, SUM_COLUMNS, |index, sums| {
            for rows in rows.data().chunks(BLOCK_ROWS * dim) {
                ctx.check()?;
                for row in rows.chunks(dim) {
                    let values = row.iter().zip(first).skip(index * SUM_COLUMNS);
                    for ((sum, squares), (value, first)) in sums.iter_mut().zip(values) {
                        let difference = f64::from(*value) - f64::from(*first);
                        *sum += difference;
                        *squares += difference * difference;
                    }
                }
            }
            Ok(())
        })
    }

    /// `relative`: squared error over squared norm. `centred`: over the squared norm left after removing the mean row,
    /// where any is left. `weighted`, if weights were given. An error of nothing is 0, whatever it is divided by, and one
    /// of rows of zeros the largest number.
    pub fn finish(&self, weighted: bool) -> Map<String, Value> {
        let left = |(sum, squares): &(f64, f64)| (squares - sum * sum / self.rows.max(1.0)).max(0.0);
        let centred: f64 = self.columns.iter().map(left).sum();
        let share = |error: f64, energy: f64| match error == 0.0 {
            true => 0.0,
            false => (error / energy.max(f64::MIN_POSITIVE)).min(f64::MAX),
        };
        let mut errors = Map::new();
        errors.insert("relative".into(), share(self.error, self.energy).into());
        if centred > 0.0 || self.error == 0.0 {
            errors.insert("centred".into(), share(self.error, centred).into());
        }
        if weighted {
            errors.insert("weighted".into(), share(self.weighted_error, self.weighted_energy).into());
        }
        errors
    }
}

/// Squared distance in float64.
fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b)).map(|d| d * d).sum()
}

fn squared_norm(a: &[f32]) -> f64 {
    a.iter().map(|v| f64::from(*v) * f64::from(*v)).sum()
}

// What several quantizers share -------------------------------------------------------------------------------------

/// Refuses an integer parameter outside a range.
fn within(name: &str, value: usize, low: usize, high: usize) -> Result<()> {
    if value < low || value > high {
        return Err(Error::parameter(name, value, format!("must be from {low} to {high}")));
    }
    Ok(())
}

/// Refuses a tolerance that is negative or not a number.
fn check_loop(max_iter: usize, tol: f64) -> Result<()> {
    within("max_iter", max_iter, 1, 1_000_000)?;
    if !(tol >= 0.0 && tol.is_finite()) {
        return Err(Error::parameter("tol", tol, "must be 0 or more"));
    }
    Ok(())
}

/// Clusters for `bits` bits and `wanted` of them, given the rows there are; says so in `notes` where fewer.
fn shrink_clusters(wanted: usize, rows: usize, notes: &mut Vec<String>) -> usize {
    if rows < wanted {
        notes.push(format!("{rows} rows are fewer than {wanted} clusters: using {rows} clusters"));
    }
    wanted.min(rows)
}

/// Says in `notes` that seeding ran out of distinct rows.
fn note_distinct(distinct: usize, clusters: usize, notes: &mut Vec<String>) {
    if distinct < clusters {
        notes.push(format!("only {distinct} distinct rows for {clusters} clusters: using {distinct} clusters"));
    }
}

/// Refuses codebooks that no machine would hold, before anything is allocated. `width`: columns of all books together.
fn check_codebooks(width: usize, bits: u32) -> Result<()> {
    const MOST: usize = 1 << 33;
    match width.checked_mul(1 << bits).filter(|values| *values <= MOST) {
        Some(_) => Ok(()),
        None => Err(Error::OutOfRange {
            what: format!("codebooks of 2^{bits} entries over {width} columns in all are too large"),
            why: "use fewer bits, clusters or stages".into(),
        }),
    }
}

/// A group of books that all have the same width and entries.
fn group(width: usize, entries: usize, starts: Vec<usize>) -> GroupSpec {
    GroupSpec { width, entries, starts }
}

/// Encodes each book on its own: its columns' nearest entry. Exact for books that do not overlap.
fn encode_nearest<'a>(decoder: &'a Decoder) -> Result<Encoder<'a>> {
    let Decoder::Books(books) = decoder else {
        return Err(Error::shape("the decoder", decoder.form(), "the form books"));
    };
    let parts: Vec<(usize, Centroids)> =
        books.books().into_iter().map(|(start, width, entries)| (start, Centroids::new(&entries, width))).collect();
    let (count, dim) = (parts.len(), decoder.dim());
    let parts = Parts::new(parts, dim);
    let bits = books.bits();
    Ok(Box::new(move |rows: Matrix, codes: &mut [u8]| {
        let mut labels = vec![0u32; count * rows.rows()];
        parts.nearest_block(Columns::from(rows), &mut labels);
        let bytes = codes.len() / rows.rows();
        for (row, code) in codes.chunks_mut(bytes).enumerate() {
            bits::pack((0..count).map(|part| labels[part * rows.rows() + row]), bits, code);
        }
        Ok(())
    }))
}
