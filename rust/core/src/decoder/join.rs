//! Form `join`: the rows of several decoders, side by side or added. A row's code is theirs, one behind the other.

use super::{inner_tensors, outer_tensors, Budget, Decoder, Form};
use crate::error::{Error, Result};
use crate::kernels::{Ids, Rows};
use crate::tensor::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// How the parts make a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Joining {
    /// Columns of one behind the columns of another.
    Columns,
    /// All of the same columns, added in order.
    Sum,
}

/// The description of a `Join` decoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinSpec {
    dim: usize,
    mode: Joining,
    parts: Vec<Map<String, Value>>,
}

/// The rows of several decoders, side by side or added.
#[derive(Clone)]
pub struct Join {
    dim: usize,
    mode: Joining,
    parts: Vec<Decoder>,
}

/// Rows that are decoded at a time.
const BLOCK_ROWS: usize = 64;

/// Most parts: each takes a call.
const MOST_PARTS: usize = 4096;

impl Join {
    /// The form's name.
    pub const FORM: &'static str = "join";

    /// Parts side by side or added.
    pub fn new(mode: Joining, parts: Vec<Decoder>) -> Result<Self> {
        let dim = match mode {
            Joining::Columns => parts.iter().map(Decoder::dim).sum(),
            Joining::Sum => parts.first().map_or(0, Decoder::dim),
        };
        Join::check(dim, mode, parts)
    }

    pub(super) fn from_parts(spec: JoinSpec, tensors: &[Tensor], budget: &mut Budget) -> Result<Self> {
        let bad = |found: String, expected: &str| Err(Error::shape("the decoder's description", found, expected));
        if spec.parts.len() > MOST_PARTS {
            return bad(format!("{} parts", spec.parts.len()), "1 to 4096 parts");
        }
        let mut parts = Vec::new();
        for (at, part) in spec.parts.into_iter().enumerate() {
            parts.push(budget.inner(part, &inner_tensors(tensors, &prefix(at)))?);
        }
        if tensors.len() != parts.iter().map(|part| part.tensors().len()).sum::<usize>() {
            return bad(format!("{} tensors", tensors.len()), "those of the parts");
        }
        Join::check(spec.dim, spec.mode, parts)
    }

    fn check(dim: usize, mode: Joining, parts: Vec<Decoder>) -> Result<Self> {
        let bad = |found: String, expected: &str| Err(Error::shape("the decoder's description", found, expected));
        if parts.is_empty() || parts.len() > MOST_PARTS {
            return bad(format!("{} parts", parts.len()), "1 to 4096 parts");
        }
        if let Some(part) = parts.iter().find(|part| !part.rows_apart()) {
            return bad(format!("the form {} inside", part.form()), "decoders whose rows stand apart");
        }
        // A part gets the codes of some rows, cut out, or the numbers of the rows.
        if let Some(part) = parts.iter().find(|part| part.by_number() && part.row_bytes() > 0) {
            return bad(
                format!("a part of form {}", part.form()),
                "parts that read rows by their codes or their numbers",
            );
        }
        let agrees = match mode {
            Joining::Columns => parts.iter().map(Decoder::dim).sum::<usize>() == dim,
            Joining::Sum => parts.iter().all(|part| part.dim() == dim),
        };
        if !agrees || dim > 1 << 24 {
            return bad(format!("dim {dim}"), "the columns of the parts");
        }
        Ok(Join { dim, mode, parts })
    }

    /// The decoders inside.
    pub fn parts(&self) -> &[Decoder] {
        &self.parts
    }
}

fn prefix(at: usize) -> String {
    format!("parts.{at}.")
}

impl Form for Join {
    fn name(&self) -> &'static str {
        Join::FORM
    }

    fn dim(&self) -> usize {
        self.dim
    }

    fn row_bytes(&self) -> usize {
        self.parts.iter().map(Decoder::row_bytes).sum()
    }

    fn by_number(&self) -> bool {
        self.parts.iter().any(Decoder::by_number)
    }

    fn decode_floats(&self, rows: &Rows, out: &mut [f32]) {
        let (dim, row_bytes) = (self.dim, self.row_bytes());
        let (mut codes, mut values) = (Vec::new(), Vec::new());
        for (block, out) in out.chunks_mut(BLOCK_ROWS * dim).enumerate() {
            let count = out.len() / dim;
            let block = rows.part(block * BLOCK_ROWS..block * BLOCK_ROWS + count);
            let (mut byte, mut column) = (0, 0);
            for (at, part) in self.parts.iter().enumerate() {
                values.resize(count * part.dim(), 0f32);
                if part.row_bytes() == 0 {
                    part.decode_rows(&Rows { codes: &[], stream: false, ..block.clone() }, (&mut values).into());
                } else {
                    codes.clear();
                    for position in block.range.clone() {
                        let start = block.ids.get(position) * row_bytes + byte;
                        codes.extend_from_slice(&block.codes[start..start + part.row_bytes()]);
                    }
                    part.decode(&codes, Ids::Range { start: 0, len: count }, &mut values);
                }
                for (row, values) in out.chunks_mut(dim).zip(values.chunks(part.dim())) {
                    match self.mode {
                        Joining::Sum if at > 0 => row.iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
                        _ => row[column..column + values.len()].copy_from_slice(values),
                    }
                }
                byte += part.row_bytes();
                column += if self.mode == Joining::Columns { part.dim() } else { 0 };
            }
        }
    }

    fn tensors(&self) -> Vec<Tensor> {
        self.parts.iter().enumerate().flat_map(|(at, part)| outer_tensors(part, &prefix(at))).collect()
    }

    fn spec(&self) -> Value {
        let parts = self.parts.iter().map(Decoder::describe).collect();
        serde_json::to_value(JoinSpec { dim: self.dim, mode: self.mode, parts }).unwrap_or_default()
    }

    fn with_tensors(&self, tensors: &[Tensor]) -> Result<Decoder> {
        let part = |(at, part): (usize, &Decoder)| part.with_tensors(&inner_tensors(tensors, &prefix(at)));
        let parts: Result<Vec<Decoder>> = self.parts.iter().enumerate().map(part).collect();
        Ok(Decoder::Join(Join::new(self.mode, parts?)?))
    }

    fn bad_row(&self, codes: &[u8]) -> Option<usize> {
        let row_bytes = self.row_bytes();
        let mut byte = 0;
        let mut first: Option<usize> = None;
        for part in self.parts.iter().filter(|part| part.row_bytes() > 0) {
            let cut: Vec<u8> =
                codes.chunks_exact(row_bytes).flat_map(|row| &row[byte..byte + part.row_bytes()]).copied().collect();
            let bad = part.bad_row(&cut);
            first = first.into_iter().chain(bad).min();
            byte += part.row_bytes();
        }
        first
    }
}
