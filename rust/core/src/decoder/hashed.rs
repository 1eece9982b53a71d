//! Form `hashed`: a row is a sum of pieces of arrays. Where a piece starts is computed from the row's number, or stands
//! in the row's code.

use super::{Decoder, Form};
use crate::bits;
use crate::error::{Error, Result};
use crate::kernels::Rows;
use crate::rng;
use crate::tensor::{Dtype, Tensor};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Which of the pieces of an array a row takes: a number below `size`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
enum Place {
    /// A hash of the id.
    Hash { seed: u64, size: u64 },
    /// A digit of the id: itself, its quotient or its remainder.
    Digit { divisor: u64, size: u64 },
    /// A field of the row's code.
    Stored { field: usize, size: u64 },
}

/// A piece of an array: it starts at `offset + place * stride`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Piece {
    array: usize,
    place: Place,
    stride: usize,
    offset: usize,
}

/// What some columns of a row get.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Term {
    start: usize,
    width: usize,
    piece: Piece,
    /// Seed of a sign for each id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sign: Option<u64>,
    /// One value that the piece is multiplied by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    weight: Option<Piece>,
    /// Columns are multiplied by the piece; else it is added.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    multiply: bool,
}

/// The description of a `Hashed` decoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HashedSpec {
    dim: usize,
    /// Bits of a field of a row's code.
    bits: u32,
    /// The id of row 0.
    first: u64,
    terms: Vec<Term>,
}

/// A sum of pieces of arrays.
#[derive(Clone)]
pub struct Hashed {
    spec: HashedSpec,
    arrays: Vec<Tensor>,
    row_bytes: usize,
}

/// Rows whose places are computed before their pieces are read, so that reads from memory overlap.
const BLOCK_ROWS: usize = 64;

/// Most terms.
const MOST_TERMS: usize = 4096;

/// Most values of all terms of a row, fields of a code, and places.
const MOST_VALUES: usize = 1 << 26;
const MOST_FIELDS: usize = 1 << 24;
const MOST_PLACES: u64 = 1 << 31;

impl Place {
    fn size(&self) -> u64 {
        match self {
            Place::Hash { size, .. } | Place::Digit { size, .. } | Place::Stored { size, .. } => *size,
        }
    }

    /// Below `size`, whatever the id and the code are.
    #[inline(always)]
    fn of(&self, id: u64, code: &[u8], bits: u32) -> u64 {
        match *self {
            Place::Hash { seed, size } => ((u128::from(rng::hash(id, seed)) * u128::from(size)) >> 64) as u64,
            Place::Digit { divisor, size } => {
                let quotient = if divisor == 1 { id } else { id / divisor };
                if quotient < size {
                    quotient
                } else {
                    quotient % size
                }
            }
            Place::Stored { field, size } => bits::get_wide(code, bits, field).min(size - 1),
        }
    }
}

/// What is done with a piece.
#[derive(Clone, Copy)]
enum Put {
    Store,
    Add,
    Multiply,
}

/// Stores, adds or multiplies a piece of each row.
#[inline(always)]
fn put<T: Copy>(
    values: &[T],
    to: impl Fn(T) -> f32,
    (term, how): (&Term, Put),
    at: &[(usize, f32)],
    dim: usize,
    out: &mut [f32],
) {
    for (row, (at, factor)) in out.chunks_exact_mut(dim).zip(at) {
        let columns = row[term.start..term.start + term.width].iter_mut();
        let piece = columns.zip(&values[*at..*at + term.width]);
        match how {
            Put::Store => piece.for_each(|(column, value)| *column = to(*value) * factor),
            Put::Add => piece.for_each(|(column, value)| *column += to(*value) * factor),
            Put::Multiply => piece.for_each(|(column, value)| *column *= to(*value) * factor),
        }
    }
}

/// A value of an array.
fn value(array: &Tensor, at: usize) -> f32 {
    match array.dtype {
        Dtype::F32 => array.floats()[at],
        Dtype::F16 => f16::from_bits(array.halves()[at]).to_f32(),
        Dtype::Bf16 => bf16::from_bits(array.halves()[at]).to_f32(),
        Dtype::I8 => array.integers()[at].into(),
        _ => array.data.bytes()[at].into(),
    }
}

impl Hashed {
    /// The form's name.
    pub const FORM: &'static str = "hashed";

    pub(super) fn from_parts(spec: HashedSpec, tensors: &[Tensor]) -> Result<Self> {
        let bad = |found: String, expected: &str| Err(Error::shape("the decoder's description", found, expected));
        if spec.dim == 0 || spec.dim > 1 << 24 {
            return bad(format!("dim {}", spec.dim), "1 to 16777216 columns");
        }
        if spec.terms.is_empty() || spec.terms.len() > MOST_TERMS {
            return bad(format!("{} terms", spec.terms.len()), "1 to 4096 terms");
        }
        if spec.bits > bits::MAX_WIDE_BITS {
            return bad(format!("{} bits", spec.bits), "0 to 32 bits");
        }
        let mut arrays = Vec::new();
        for at in 0..tensors.len() {
            let name = format!("arrays.{at}");
            match tensors.iter().find(|tensor| tensor.name == name) {
                Some(tensor) if tensor.dtype != Dtype::U64 => arrays.push(tensor.clone()),
                _ => return bad(format!("no array {name} among {} tensors", tensors.len()), "arrays of values"),
            }
        }
        let (mut covered, mut values, mut fields) = (vec![false; spec.dim], 0usize, 0);
        for (at, term) in spec.terms.iter().enumerate() {
            values = values.saturating_add(term.width);
            let columns = term.start.checked_add(term.width).and_then(|end| covered.get_mut(term.start..end));
            let Some(columns) = columns.filter(|columns| !columns.is_empty() && values <= MOST_VALUES) else {
                return bad(format!("{} columns from {} on", term.width, term.start), "columns of the row");
            };
            if term.multiply && columns.contains(&false) {
                return bad(format!("term {at} multiplies"), "columns that terms before it fill");
            }
            columns.fill(true);
            for (piece, width) in [(Some(&term.piece), term.width), (term.weight.as_ref(), 1)] {
                let Some(piece) = piece else { continue };
                if !piece.fits(&arrays, width) {
                    return bad(format!("term {at}: {piece:?} of {width} values"), "pieces inside their array");
                }
                if let Place::Stored { field, .. } = piece.place {
                    if spec.bits == 0 || field >= MOST_FIELDS {
                        return bad(format!("field {field} of {} bits", spec.bits), "fields of at least one bit");
                    }
                    fields = fields.max(field + 1);
                }
            }
        }
        if covered.contains(&false) {
            return bad("columns without a term".into(), "a term for each column");
        }
        let row_bytes = bits::row_bytes(fields, spec.bits);
        Ok(Hashed { spec, arrays, row_bytes })
    }

    /// Where a row's piece starts.
    #[inline(always)]
    fn start(&self, piece: &Piece, id: u64, code: &[u8]) -> usize {
        piece.offset + piece.place.of(id, code, self.spec.bits) as usize * piece.stride
    }
}

impl Piece {
    /// Whether every place has all its values.
    fn fits(&self, arrays: &[Tensor], width: usize) -> bool {
        let size = self.place.size();
        let last = usize::try_from(size.wrapping_sub(1)).ok().and_then(|last| last.checked_mul(self.stride));
        let end = last.and_then(|last| last.checked_add(self.offset)).and_then(|last| last.checked_add(width));
        let divides = !matches!(self.place, Place::Digit { divisor: 0, .. });
        let hashes = !matches!(self.place, Place::Hash { .. }) || size <= MOST_PLACES;
        let inside = arrays.get(self.array).is_some_and(|array| end.is_some_and(|end| end <= array.len()));
        size > 0 && divides && hashes && inside
    }
}

impl Form for Hashed {
    fn name(&self) -> &'static str {
        Hashed::FORM
    }

    fn dim(&self) -> usize {
        self.spec.dim
    }

    fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    fn by_number(&self) -> bool {
        let stored = |piece: &Piece| matches!(piece.place, Place::Stored { .. });
        !self.spec.terms.iter().all(|t| stored(&t.piece) && t.sign.is_none() && t.weight.iter().all(stored))
    }

    fn decode_floats(&self, rows: &Rows, out: &mut [f32]) {
        let dim = self.spec.dim;
        let mut at = [(0, 1f32); BLOCK_ROWS];
        for (block, out) in out.chunks_mut(BLOCK_ROWS * dim).enumerate() {
            let start = rows.range.start + block * BLOCK_ROWS;
            let positions = start..start + out.len() / dim;
            let stored = self.spec.terms[0].width == dim;
            if !stored {
                // Nothing changes by being added to this zero, a zero's sign neither.
                out.fill(-0.0);
            }
            for (number, term) in self.spec.terms.iter().enumerate() {
                for (at, position) in at.iter_mut().zip(positions.clone()) {
                    let row = rows.ids.get(position);
                    let code = &rows.codes[row * self.row_bytes..][..self.row_bytes];
                    let id = self.spec.first.wrapping_add(row as u64);
                    let sign = term.sign.is_some_and(|seed| rng::hash(id, seed) & 1 == 1);
                    let weigh = |piece: &Piece| value(&self.arrays[piece.array], self.start(piece, id, code));
                    let weight = term.weight.as_ref().map_or(1.0, weigh);
                    *at = (self.start(&term.piece, id, code), if sign { -weight } else { weight });
                }
                let array = &self.arrays[term.piece.array];
                let how = match term.multiply {
                    true => Put::Multiply,
                    false if stored && number == 0 => Put::Store,
                    false => Put::Add,
                };
                let job = (term, how);
                match array.dtype {
                    Dtype::F32 => put(array.floats(), |value| value, job, &at, dim, out),
                    Dtype::F16 => put(array.halves(), |bits| f16::from_bits(bits).to_f32(), job, &at, dim, out),
                    Dtype::Bf16 => put(array.halves(), |bits| bf16::from_bits(bits).to_f32(), job, &at, dim, out),
                    Dtype::I8 => put(array.integers(), f32::from, job, &at, dim, out),
                    _ => put(array.data.bytes(), f32::from, job, &at, dim, out),
                }
            }
        }
    }

    fn tensors(&self) -> Vec<Tensor> {
        self.arrays.clone()
    }

    fn spec(&self) -> Value {
        serde_json::to_value(&self.spec).unwrap_or_default()
    }

    fn with_tensors(&self, tensors: &[Tensor]) -> Result<Decoder> {
        let mut arrays = Vec::new();
        for old in &self.arrays {
            let new = super::take(tensors, &old.name, None, &old.shape)?;
            arrays.push(match new.dtype == old.dtype {
                true => new.clone(),
                false => Tensor::of_floats(&old.name, old.dtype, old.shape.clone(), &new.to_floats())?,
            });
        }
        Ok(Decoder::Hashed(Hashed { arrays, ..self.clone() }))
    }
}
