//! How a code becomes a vector: a small closed set of forms.
//!
//! A decoder is plain data: a description (JSON) and named tensors. Reading needs nothing else, so a file written by a
//! quantizer that this version has never heard of can still be looked up.

mod books;
mod hashed;
mod join;
mod levels;
mod linear;
mod segments;
mod sparse;
mod switch;
mod trellis;

pub(crate) use books::power_of_two;
pub use books::{Books, CodebookDtype, GroupSpec};
pub use hashed::Hashed;
pub use join::{Join, Joining};
pub use levels::{Granularity, Levels, LevelsSpec, Number, ScaleDtype};
pub use linear::{Linear, LinearMap, MatrixDtype, Rotation};
pub use segments::Segments;
pub use sparse::{Kept, Places, Sparse, SparseSpec};
pub use switch::Switch;
pub use trellis::{Trellis, TrellisSpec, MOST_SCALE_BITS};

use crate::error::{Error, Result};
use crate::kernels::{self, Bags, Ids, Output, Rows};
use crate::tensor::Tensor;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Makes a decoder from the rest of its description and its tensors.
type Read = fn(Value, &[Tensor], &mut Budget) -> Result<Decoder>;

/// Most decoders inside each other, the outermost one counted.
const MOST_DEPTH: usize = 16;

/// Most values that all decoders of a table compute for a row. Bounds the work that a few bytes of a file may ask for.
const MOST_VALUES: usize = 1 << 26;

/// What the description of a decoder may still ask for.
struct Budget {
    depth: usize,
    values: usize,
}

impl Default for Budget {
    fn default() -> Self {
        Budget { depth: MOST_DEPTH, values: MOST_VALUES }
    }
}

impl Budget {
    /// Takes `count` lots of `values` values.
    fn spend(&mut self, values: usize, count: usize) -> Result<()> {
        let left = values.checked_mul(count).and_then(|values| self.values.checked_sub(values));
        self.values = left.ok_or_else(|| {
            let expected = format!("at most {MOST_VALUES}, those of inner decoders and of rotations' passes counted");
            Error::shape("the decoder's description", format!("{values} columns {count} times, among others"), expected)
        })?;
        Ok(())
    }

    /// A decoder inside another one.
    fn inner(&mut self, description: Map<String, Value>, tensors: &[Tensor]) -> Result<Decoder> {
        let left = self.depth.checked_sub(1).ok_or_else(|| {
            let found = format!("more than {MOST_DEPTH} decoders inside each other");
            Error::shape("the decoder's description", found, "fewer")
        })?;
        self.depth = left;
        let decoder = self.read(description, tensors)?;
        self.depth = left + 1;
        self.spend(decoder.dim(), 1)?;
        Ok(decoder)
    }

    fn read(&mut self, mut description: Map<String, Value>, tensors: &[Tensor]) -> Result<Decoder> {
        if let Some((form, known)) = unknown_form(&description) {
            return Err(Error::UnknownForm { form, known });
        }
        let form = description.remove("form").and_then(|f| f.as_str().map(str::to_owned)).unwrap_or_default();
        let read = FORMS.iter().find(|(name, _)| *name == form);
        let read = read.ok_or_else(|| Error::shape("the decoder's description", "no form", "the name of a form"))?.1;
        read(Value::Object(description), tensors, self)
    }
}

/// The name of a form that this version does not read, if the description has one, and the names of those it does.
fn unknown_form(description: &Map<String, Value>) -> Option<(String, String)> {
    let form = description.get("form").and_then(Value::as_str)?;
    let names: Vec<&str> = FORMS.iter().map(|(name, _)| *name).collect();
    (!names.contains(&form)).then(|| (form.chars().take(100).collect(), names.join(", ")))
}

/// The forms that this version reads, by name.
const FORMS: &[(&str, Read)] = &[
    (Books::FORM, |spec, tensors, _| Ok(Decoder::Books(Books::from_parts(parse(spec)?, tensors)?))),
    (Levels::FORM, |spec, tensors, _| Ok(Decoder::Levels(Levels::from_parts(parse(spec)?, tensors)?))),
    (Linear::FORM, |spec, tensors, budget| {
        Ok(Decoder::Linear(Linear::from_parts(parse(spec)?, tensors, budget)?.into()))
    }),
    (Join::FORM, |spec, tensors, budget| Ok(Decoder::Join(Join::from_parts(parse(spec)?, tensors, budget)?))),
    (Trellis::FORM, |spec, tensors, _| Ok(Decoder::Trellis(Trellis::from_parts(parse(spec)?, tensors)?))),
    (Segments::FORM, |spec, tensors, budget| {
        Ok(Decoder::Segments(Segments::from_parts(parse(spec)?, tensors, budget)?))
    }),
    (Sparse::FORM, |spec, tensors, _| Ok(Decoder::Sparse(Sparse::from_parts(parse(spec)?, tensors)?))),
    (Hashed::FORM, |spec, tensors, _| Ok(Decoder::Hashed(Hashed::from_parts(parse(spec)?, tensors)?))),
    (Switch::FORM, |spec, tensors, budget| Ok(Decoder::Switch(Switch::from_parts(parse(spec)?, tensors, budget)?))),
];

/// What every form can do. Ids must be inside the codes; everything runs on the calling thread.
pub trait Form {
    /// The form's name.
    fn name(&self) -> &'static str;

    /// Values in a row.
    fn dim(&self) -> usize;

    /// Bytes of a row's code.
    fn row_bytes(&self) -> usize;

    /// Whether a row's code stands by itself. Else all codes together are a table's, of as many rows as the form knows.
    fn rows_apart(&self) -> bool {
        true
    }

    /// Whether a row depends on its number, beside its code.
    fn by_number(&self) -> bool {
        false
    }

    /// Decodes some rows of a call as float32.
    fn decode_floats(&self, rows: &Rows, out: &mut [f32]);

    /// Decodes some rows of a call. Forms with kernels that round in registers have their own.
    fn decode(&self, rows: &Rows, out: Output) {
        kernels::best().write(self.dim(), out, |range, out| self.decode_floats(&rows.part(range), out));
    }

    /// Bytes of a call's output from which it is written past the caches, where it would not be found again anyway. Below,
    /// memory that is used again and again, as allocators and `out` make it, stays in the last cache, which takes what is
    /// written faster.
    fn stream_bytes(&self) -> usize {
        4 << 20
    }

    /// Combines decoded rows, a row of `out` for each bag. Forms with kernels that add in registers have their own.
    fn pool(&self, bags: &Bags, out: &mut [f32]) {
        kernels::pool_rows(bags, self.dim(), out, |rows, out| self.decode_floats(rows, out));
    }

    /// The query's tables, where the form and the metric allow the score to be a sum over fields.
    fn scorer(&self, _query: &[f32], _metric: Metric) -> Option<Scorer> {
        None
    }

    /// The named arrays, in the order of the file.
    fn tensors(&self) -> Vec<Tensor>;

    /// Everything else but the name, as a JSON object.
    fn spec(&self) -> Value;

    /// The same with other values in its tensors (same names and shapes; floats round to the stored type).
    fn with_tensors(&self, tensors: &[Tensor]) -> Result<Decoder>;

    /// The first row whose own scales are not finite, if any.
    fn bad_row(&self, _codes: &[u8]) -> Option<usize> {
        None
    }
}

/// What a search compares by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Larger is better.
    InnerProduct,
    /// Squared Euclidean distance: smaller is better.
    L2,
    /// Inner product over both norms: larger is better.
    Cosine,
}

/// A query prepared for one decoder: for each field of a code, the contribution of every value it can take.
pub struct Scorer {
    /// Fields of a row.
    pub fields: usize,
    /// Bits of a field.
    pub bits: u32,
    /// Table of field `m` is `tables[m << bits..(m + 1) << bits]`.
    pub tables: Vec<f32>,
    /// What every row's score starts from.
    pub bias: f32,
}

impl Scorer {
    /// The score of one row: the sum of its fields' contributions, in order.
    #[inline]
    pub fn score(&self, row: &[u8]) -> f32 {
        let mut sum = self.bias;
        for field in 0..self.fields {
            let code = crate::bits::get(row, self.bits, field) as usize;
            sum += self.tables[(field << self.bits) + code];
        }
        sum
    }
}

/// How a code becomes a vector.
#[derive(Clone)]
pub enum Decoder {
    /// A sum of codebook entries, each placed at some columns.
    Books(Books),
    /// Small numbers with scales per row, block or column.
    Levels(Levels),
    /// A mean row, and another decoder's rows through a linear map.
    Linear(Box<Linear>),
    /// Other decoders' rows, side by side or added.
    Join(Join),
    /// Circular streams of bits, of which each column reads a window.
    Trellis(Trellis),
    /// Groups of rows with decoders of their own.
    Segments(Segments),
    /// A few values with their columns.
    Sparse(Sparse),
    /// A sum of pieces of arrays that the row's number picks.
    Hashed(Hashed),
    /// Rows that are read in different ways.
    Switch(Switch),
}

impl Decoder {
    /// What the form does.
    fn get(&self) -> &dyn Form {
        match self {
            Decoder::Books(form) => form,
            Decoder::Levels(form) => form,
            Decoder::Linear(form) => form.as_ref(),
            Decoder::Join(form) => form,
            Decoder::Trellis(form) => form,
            Decoder::Segments(form) => form,
            Decoder::Sparse(form) => form,
            Decoder::Hashed(form) => form,
            Decoder::Switch(form) => form,
        }
    }

    /// The decoder behind the mean and rotation, and before what codes the rest.
    pub fn first(&self) -> &Decoder {
        match self {
            Decoder::Linear(linear) => linear.inner().first(),
            Decoder::Join(join) => join.parts()[0].first(),
            other => other,
        }
    }

    /// The form's name.
    pub fn form(&self) -> &'static str {
        self.get().name()
    }

    /// Values in a row.
    pub fn dim(&self) -> usize {
        self.get().dim()
    }

    /// Bytes of a row's code.
    pub fn row_bytes(&self) -> usize {
        self.get().row_bytes()
    }

    /// See [`Form::rows_apart`].
    pub fn rows_apart(&self) -> bool {
        self.get().rows_apart()
    }

    /// See [`Form::by_number`].
    pub fn by_number(&self) -> bool {
        self.get().by_number()
    }

    /// Decodes the rows `ids` of `codes` into `out`, on the calling thread. Ids must be inside the codes.
    pub fn decode<'a>(&self, codes: &[u8], ids: Ids, out: impl Into<Output<'a>>) {
        self.decode_rows(&Rows { codes, ids, range: 0..ids.len(), stream: false }, out.into());
    }

    /// See [`Form::stream_bytes`].
    pub fn stream_bytes(&self) -> usize {
        self.get().stream_bytes()
    }

    /// Decodes some rows of a call into `out`, on the calling thread. Ids must be inside the codes.
    pub fn decode_rows(&self, rows: &Rows, out: Output) {
        self.get().decode(rows, out);
    }

    /// Combines decoded rows, a row of `out` for each bag, on the calling thread. Ids must be inside the codes.
    pub fn pool(&self, bags: &Bags, out: &mut [f32]) {
        self.get().pool(bags, out);
    }

    /// The query's tables, where the form and the metric allow the score to be a sum over fields.
    pub fn scorer(&self, query: &[f32], metric: Metric) -> Option<Scorer> {
        self.get().scorer(query, metric)
    }

    /// The named arrays, in the order of the file.
    pub fn tensors(&self) -> Vec<Tensor> {
        self.get().tensors()
    }

    /// Everything else: a JSON object with `form` and what the form needs.
    pub fn describe(&self) -> Map<String, Value> {
        let mut object = Map::new();
        object.insert("form".into(), self.form().into());
        if let Value::Object(spec) = self.get().spec() {
            object.extend(spec);
        }
        object
    }

    /// A decoder from its description and tensors: checks every size, so that no code byte can read out of bounds. That
    /// the tensors are finite was checked where they came in: from a file block by block, from floats, from Python.
    pub fn from_parts(description: Map<String, Value>, tensors: &[Tensor]) -> Result<Decoder> {
        Budget::default().inner(description, tensors)
    }

    /// The same decoder with other values in its tensors (same names and shapes; floats round to the stored type).
    pub fn with_tensors(&self, tensors: &[Tensor]) -> Result<Decoder> {
        self.get().with_tensors(tensors)
    }

    /// The first row whose own scales are not finite, if any.
    pub fn bad_row(&self, codes: &[u8]) -> Option<usize> {
        self.get().bad_row(codes)
    }
}

/// The tensors whose names start with the prefix, without it.
fn inner_tensors(tensors: &[Tensor], prefix: &str) -> Vec<Tensor> {
    let inner = |tensor: &Tensor| tensor.name.strip_prefix(prefix).map(|name| tensor.renamed(name));
    tensors.iter().filter_map(inner).collect()
}

/// A decoder's tensors with the prefix before their names.
fn outer_tensors(decoder: &Decoder, prefix: &str) -> Vec<Tensor> {
    decoder
        .tensors()
        .into_iter()
        .map(|tensor| {
            let name = format!("{prefix}{}", tensor.name);
            tensor.renamed(name)
        })
        .collect()
}

fn parse<T: DeserializeOwned>(value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|e| Error::shape("the decoder's description", e.to_string(), "a valid one"))
}

/// The tensor of a name, which must have this type and shape.
fn take<'a>(
    tensors: &'a [Tensor],
    name: &str,
    dtype: Option<crate::tensor::Dtype>,
    shape: &[usize],
) -> Result<&'a Tensor> {
    let wanted = || format!("{} {shape:?}", dtype.map_or("a float type", |d| d.name()));
    let tensor = tensors
        .iter()
        .find(|t| t.name == name)
        .ok_or_else(|| Error::shape("the decoder", format!("no tensor {name}"), wanted()))?;
    if dtype.is_some_and(|d| d != tensor.dtype) || tensor.shape != shape {
        let found = format!("{name} of {} {:?}", tensor.dtype.name(), tensor.shape);
        return Err(Error::shape("the decoder", found, wanted()));
    }
    Ok(tensor)
}
