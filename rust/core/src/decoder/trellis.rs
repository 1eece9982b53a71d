//! Form `trellis`: a row is a circular stream of bits, and each column reads a window of it that picks a level.

use super::{take, Decoder, Form};
use crate::algo::trellis::{even_bits, Layout, MOST_BITS, MOST_STATE_BITS};
use crate::error::{Error, Result};
use crate::kernels::{self, Rows, TrellisView};
use crate::tensor::{Dtype, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;

/// Most bits of the number of a row's scale.
pub const MOST_SCALE_BITS: u32 = 8;

/// The description of a `Trellis` decoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrellisSpec {
    /// Values in a row.
    pub dim: usize,
    /// Bytes of a row's code.
    pub row_bytes: usize,
    /// Bits of a window.
    pub state_bits: u32,
    /// Bits of the number of a row's scale.
    pub scale_bits: u32,
    /// Scales of rows that are stored: 2^scale_bits or more.
    pub scales: usize,
    /// Bits that each column adds to the stream, a digit each; nothing where all columns share the row's bits evenly.
    pub bits: String,
}

impl TrellisSpec {
    /// Bits that each column adds to the stream.
    fn column_bits(&self) -> Result<Vec<u8>> {
        let bad = |found: String, expected: &str| Err(Error::shape("the decoder's description", found, expected));
        if self.row_bytes == 0 || self.row_bytes > 1 << 28 || 8 * self.row_bytes <= self.scale_bits as usize {
            return bad(format!("row_bytes {}", self.row_bytes), "room for a scale's number and a stream");
        }
        let room = 8 * self.row_bytes as u64 - u64::from(self.scale_bits);
        let bits = match self.bits.is_empty() {
            true => even_bits(self.dim, room),
            false => self.bits.bytes().map(|digit| digit.wrapping_sub(b'0')).collect(),
        };
        let most = self.state_bits.min(u32::from(MOST_BITS));
        if bits.len() != self.dim || bits.iter().any(|bits| u32::from(*bits) > most) {
            return bad(format!("bits of {} columns", bits.len()), "a digit a column, 8 and the state bits at most");
        }
        let all: u64 = bits.iter().map(|bits| u64::from(*bits)).sum();
        if all < u64::from(self.state_bits) || all > room {
            return bad(format!("{all} bits in {} bytes", self.row_bytes), "as many as fit, the state bits at least");
        }
        Ok(bits)
    }
}

/// A row is a circular stream of bits, with the number of a scale behind it.
#[derive(Clone)]
pub struct Trellis {
    spec: TrellisSpec,
    columns: Tensor,
    scales: Tensor,
    layout: Arc<Layout>,
    levels: Arc<[f32]>,
}

impl Trellis {
    /// The form's name.
    pub const FORM: &'static str = "trellis";

    /// A decoder from its description, the columns' scales and the rows'.
    pub fn new(spec: TrellisSpec, columns: &[f32], scales: &[f32]) -> Result<Self> {
        let tensors = [
            Tensor::of_floats("columns", Dtype::F32, vec![columns.len()], columns)?,
            Tensor::of_floats("scales", Dtype::F32, vec![scales.len()], scales)?,
        ];
        Trellis::from_parts(spec, &tensors)
    }

    pub(super) fn from_parts(spec: TrellisSpec, tensors: &[Tensor]) -> Result<Self> {
        let bad = |found: String, expected: &str| Err(Error::shape("the decoder's description", found, expected));
        if spec.dim == 0 || spec.dim > 1 << 24 {
            return bad(format!("dim {}", spec.dim), "1 to 16777216 columns");
        }
        if !(1..=MOST_STATE_BITS).contains(&spec.state_bits) || spec.scale_bits > MOST_SCALE_BITS {
            let found = format!("{} state bits and {} scale bits", spec.state_bits, spec.scale_bits);
            return bad(found, "1 to 16 and at most 8");
        }
        if spec.scales < 1 << spec.scale_bits || spec.scales > 1 << MOST_SCALE_BITS {
            return bad(format!("{} scales", spec.scales), "one for each number of a scale, 256 at most");
        }
        if tensors.len() != 2 {
            return bad(format!("{} tensors", tensors.len()), "columns and scales");
        }
        let columns = take(tensors, "columns", Some(Dtype::F32), &[spec.dim])?.clone();
        let scales = take(tensors, "scales", Some(Dtype::F32), &[spec.scales])?.clone();
        let layout = Layout::new(&spec.column_bits()?, spec.state_bits);
        let levels = layout.levels();
        Ok(Trellis { spec, columns, scales, layout: Arc::new(layout), levels })
    }

    /// The description.
    pub fn spec(&self) -> &TrellisSpec {
        &self.spec
    }

    /// Where the columns read.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The tables of the layout.
    pub fn levels(&self) -> &[f32] {
        &self.levels
    }

    /// Scale of each column.
    pub fn columns(&self) -> &[f32] {
        self.columns.floats()
    }

    /// Scales of rows, by number.
    pub fn scales(&self) -> &[f32] {
        &self.scales.floats()[..1 << self.spec.scale_bits]
    }
}

impl Form for Trellis {
    fn name(&self) -> &'static str {
        Trellis::FORM
    }

    fn dim(&self) -> usize {
        self.spec.dim
    }

    fn row_bytes(&self) -> usize {
        self.spec.row_bytes
    }

    fn decode_floats(&self, rows: &Rows, out: &mut [f32]) {
        let view = TrellisView {
            dim: self.spec.dim,
            row_bytes: self.spec.row_bytes,
            bits: self.layout.bits,
            state_bits: self.spec.state_bits,
            scale_bits: self.spec.scale_bits,
            places: &self.layout.places,
            wrapped: self.layout.wrapped,
            levels: &self.levels,
            columns: self.columns(),
            scales: self.scales(),
        };
        (kernels::best().decode_trellis)(&view, rows, out);
    }

    fn tensors(&self) -> Vec<Tensor> {
        vec![self.columns.clone(), self.scales.clone()]
    }

    fn spec(&self) -> Value {
        serde_json::to_value(&self.spec).unwrap_or_default()
    }

    fn with_tensors(&self, tensors: &[Tensor]) -> Result<Decoder> {
        Ok(Decoder::Trellis(Trellis::from_parts(self.spec.clone(), tensors)?))
    }
}
