//! Form `sparse`: a row is a few values with their columns; the others are zero.

use super::{Decoder, Form};
use crate::bits;
use crate::error::{Error, Result};
use crate::kernels::Rows;
use crate::tensor::Tensor;
use half::f16;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Type of the values that are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kept {
    /// Single precision.
    Float32,
    /// IEEE half precision, times a power of two that all rows share.
    Float16,
    /// Integers from -127 to 127, with a float16 scale a row.
    Int8,
}

/// How a row says which columns it keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Places {
    /// One bit a column.
    Bitmap,
    /// The numbers of the columns, rising, of as many bits as the last column needs.
    Columns,
}

/// The description of a `Sparse` decoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SparseSpec {
    /// Values in a row.
    pub dim: usize,
    /// Values that a row keeps.
    pub kept: usize,
    /// Type of those.
    pub dtype: Kept,
    /// How their columns are written.
    pub places: Places,
    /// Power of two that float16 values and scales are multiplied by.
    pub scale_factor: f32,
}

impl SparseSpec {
    /// The description with the shorter way to write columns.
    pub fn new(dim: usize, kept: usize, dtype: Kept, scale_factor: f32) -> Self {
        let mut spec = SparseSpec { dim, kept, dtype, places: Places::Columns, scale_factor };
        if bits::row_bytes(dim, 1) <= spec.place_bytes() {
            spec.places = Places::Bitmap;
        }
        spec
    }

    /// Bits of a column's number.
    pub fn column_bits(&self) -> u32 {
        (usize::BITS - (self.dim - 1).leading_zeros()).max(1)
    }

    /// Bytes of a row that say which columns it keeps.
    pub fn place_bytes(&self) -> usize {
        match self.places {
            Places::Bitmap => bits::row_bytes(self.dim, 1),
            Places::Columns => bits::row_bytes(self.kept, self.column_bits()),
        }
    }

    /// Bytes of a row's code.
    pub fn row_bytes(&self) -> usize {
        let values = match self.dtype {
            Kept::Float32 => 4 * self.kept,
            Kept::Float16 => 2 * self.kept,
            Kept::Int8 => self.kept + 2,
        };
        self.place_bytes() + values
    }
}

/// A few values with their columns.
#[derive(Clone)]
pub struct Sparse {
    spec: SparseSpec,
}

impl Sparse {
    /// The form's name.
    pub const FORM: &'static str = "sparse";

    /// A decoder from its description.
    pub fn new(spec: SparseSpec) -> Result<Self> {
        Sparse::from_parts(spec, &[])
    }

    pub(super) fn from_parts(spec: SparseSpec, tensors: &[Tensor]) -> Result<Self> {
        let bad = |found: String, expected: &str| Err(Error::shape("the decoder's description", found, expected));
        if spec.dim == 0 || spec.dim > 1 << 24 {
            return bad(format!("dim {}", spec.dim), "1 to 16777216 columns");
        }
        if spec.kept == 0 || spec.kept > spec.dim {
            return bad(format!("{} values kept of {}", spec.kept, spec.dim), "at least 1, at most all");
        }
        if !(spec.scale_factor.is_finite() && spec.scale_factor > 0.0) {
            return bad(format!("factor {}", spec.scale_factor), "a positive number");
        }
        if !tensors.is_empty() {
            return bad(format!("{} tensors", tensors.len()), "none");
        }
        Ok(Sparse { spec })
    }

    /// The description.
    pub fn spec(&self) -> &SparseSpec {
        &self.spec
    }

    /// Calls `put` with the place of each kept value and its column, in order. Columns outside the row are left out, and
    /// so are those that a bitmap has too many.
    #[inline]
    fn columns(&self, code: &[u8], mut put: impl FnMut(usize, usize)) {
        let (dim, kept) = (self.spec.dim, self.spec.kept);
        if self.spec.places == Places::Columns {
            let bits = self.spec.column_bits();
            for place in 0..kept {
                let column = bits::get(code, bits, place) as usize;
                if column < dim {
                    put(place, column);
                }
            }
            return;
        }
        let mut place = 0;
        for (index, bytes) in code[..self.spec.place_bytes()].chunks(8).enumerate() {
            let mut word = bytes.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
            while word != 0 && place < kept {
                let column = 64 * index + word.trailing_zeros() as usize;
                if column < dim {
                    put(place, column);
                }
                place += 1;
                word &= word - 1;
            }
        }
    }

    /// Adds a row's values to zeros.
    fn decode_row(&self, code: &[u8], out: &mut [f32]) {
        let values = &code[self.spec.place_bytes()..];
        let half = |at: usize| f16::from_le_bytes([values[at], values[at + 1]]).to_f32();
        out.fill(0.0);
        // Adding, so that a code which names a column twice means something.
        match self.spec.dtype {
            Kept::Float32 => self.columns(code, |place, column| {
                let bytes = &values[4 * place..4 * place + 4];
                out[column] += f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }),
            Kept::Float16 => {
                self.columns(code, |place, column| out[column] += half(2 * place) * self.spec.scale_factor)
            }
            Kept::Int8 => {
                let scale = half(self.spec.kept) * self.spec.scale_factor;
                self.columns(code, |place, column| out[column] += f32::from(values[place] as i8) * scale);
            }
        }
    }
}

impl Form for Sparse {
    fn name(&self) -> &'static str {
        Sparse::FORM
    }

    fn dim(&self) -> usize {
        self.spec.dim
    }

    fn row_bytes(&self) -> usize {
        self.spec.row_bytes()
    }

    fn decode_floats(&self, rows: &Rows, out: &mut [f32]) {
        let bytes = self.spec.row_bytes();
        for (position, out) in rows.range.clone().zip(out.chunks_exact_mut(self.spec.dim)) {
            self.decode_row(&rows.codes[rows.ids.get(position) * bytes..][..bytes], out);
        }
    }

    fn tensors(&self) -> Vec<Tensor> {
        Vec::new()
    }

    fn spec(&self) -> Value {
        serde_json::to_value(&self.spec).unwrap_or_default()
    }

    fn with_tensors(&self, tensors: &[Tensor]) -> Result<Decoder> {
        Ok(Decoder::Sparse(Sparse::from_parts(self.spec.clone(), tensors)?))
    }

    fn bad_row(&self, codes: &[u8]) -> Option<usize> {
        let half = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]).is_finite();
        let from = self.spec.place_bytes() + if self.spec.dtype == Kept::Int8 { self.spec.kept } else { 0 };
        codes.chunks(self.spec.row_bytes()).position(|row| match self.spec.dtype {
            Kept::Float32 => row[from..].chunks(4).any(|b| !f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_finite()),
            _ => !row[from..].chunks(2).all(half),
        })
    }
}
