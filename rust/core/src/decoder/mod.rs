//! How a code becomes a vector: a small closed set of forms.
//!
//! A decoder is plain data: a description (JSON) and named tensors. Reading needs nothing else, so a file written by a
//! quantizer that this version has never heard of can still be looked up.

mod books;
mod levels;

pub use books::{Books, CodebookDtype, GroupSpec};
pub use levels::{Granularity, Levels, LevelsSpec, Number};

use crate::error::{Error, Result};
use crate::kernels::{Bags, Ids, Output, Rows};
use crate::tensor::Tensor;
use serde_json::{Map, Value};

/// The forms that this version reads.
pub const FORMS: &[&str] = &[Books::FORM, Levels::FORM];

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
}

impl Scorer {
    /// The score of one row: the sum of its fields' contributions, in order.
    #[inline]
    pub fn score(&self, row: &[u8]) -> f32 {
        let mut sum = 0.0;
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
}

impl Decoder {
    /// The form's name.
    pub fn form(&self) -> &'static str {
        match self {
            Decoder::Books(_) => Books::FORM,
            Decoder::Levels(_) => Levels::FORM,
        }
    }

    /// Values in a row.
    pub fn dim(&self) -> usize {
        match self {
            Decoder::Books(books) => books.dim(),
            Decoder::Levels(levels) => levels.dim(),
        }
    }

    /// Bytes of a row's code.
    pub fn row_bytes(&self) -> usize {
        match self {
            Decoder::Books(books) => books.row_bytes(),
            Decoder::Levels(levels) => levels.row_bytes(),
        }
    }

    /// Decodes the rows `ids` of `codes` into `out`, on the calling thread. Ids must be inside the codes.
    pub fn decode<'a>(&self, codes: &[u8], ids: Ids, out: impl Into<Output<'a>>) {
        self.decode_rows(&Rows { codes, ids, range: 0..ids.len(), stream: false }, out.into());
    }

    /// Decodes some rows of a call into `out`, on the calling thread. Ids must be inside the codes.
    pub fn decode_rows(&self, rows: &Rows, out: Output) {
        match self {
            Decoder::Books(books) => books.decode(rows, out),
            Decoder::Levels(levels) => levels.decode(rows, out),
        }
    }

    /// Combines decoded rows, a row of `out` for each bag, on the calling thread. Ids must be inside the codes.
    pub fn pool(&self, bags: &Bags, out: &mut [f32]) {
        match self {
            Decoder::Books(books) => books.pool(bags, out),
            Decoder::Levels(levels) => levels.pool(bags, out),
        }
    }

    /// The query's tables, where the form and the metric allow the score to be a sum over fields.
    pub fn scorer(&self, query: &[f32], metric: Metric) -> Option<Scorer> {
        match self {
            Decoder::Books(books) => books.scorer(query, metric),
            Decoder::Levels(_) => None,
        }
    }

    /// The named arrays, in the order of the file.
    pub fn tensors(&self) -> Vec<Tensor> {
        match self {
            Decoder::Books(books) => books.tensors(),
            Decoder::Levels(levels) => levels.tensors(),
        }
    }

    /// Everything else: a JSON object with `form` and what the form needs.
    pub fn describe(&self) -> Map<String, Value> {
        let (form, spec) = match self {
            Decoder::Books(books) => (Books::FORM, serde_json::to_value(books.spec())),
            Decoder::Levels(levels) => (Levels::FORM, serde_json::to_value(levels.spec())),
        };
        let mut object = Map::new();
        object.insert("form".into(), form.into());
        if let Ok(Value::Object(spec)) = spec {
            object.extend(spec);
        }
        object
    }

    /// A decoder from its description and tensors: checks every size, so that no code byte can read out of bounds. That
    /// the tensors are finite was checked where they came in: from a file block by block, from floats, from Python.
    pub fn from_parts(description: &Map<String, Value>, tensors: &[Tensor]) -> Result<Decoder> {
        let mut spec = description.clone();
        let form = spec.remove("form").and_then(|f| f.as_str().map(str::to_owned)).unwrap_or_default();
        let spec = Value::Object(spec);
        match form.as_str() {
            Books::FORM => Ok(Decoder::Books(Books::from_parts(parse(spec)?, tensors)?)),
            Levels::FORM => Ok(Decoder::Levels(Levels::from_parts(parse(spec)?, tensors)?)),
            other => {
                Err(Error::parameter("form", format!("{other:?}"), "this version reads the forms books and levels"))
            }
        }
    }

    /// The same decoder with other values in its tensors (same names and shapes; floats round to the stored type).
    pub fn with_tensors(&self, tensors: &[Tensor]) -> Result<Decoder> {
        match self {
            Decoder::Books(books) => Ok(Decoder::Books(books.with_tensors(tensors)?)),
            Decoder::Levels(levels) => Ok(Decoder::Levels(levels.with_tensors(tensors)?)),
        }
    }

    /// The first row whose own scales are not finite, if any.
    pub fn bad_row(&self, codes: &[u8]) -> Option<usize> {
        match self {
            Decoder::Books(_) => None,
            Decoder::Levels(levels) => levels.bad_row(codes),
        }
    }
}

fn parse<T: serde::de::DeserializeOwned>(value: Value) -> Result<T> {
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
