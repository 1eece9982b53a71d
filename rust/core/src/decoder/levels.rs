//! Form `levels`: a row is a list of small numbers, with scales per row, block or column.

use super::{take, Decoder, Form};
use crate::bits;
use crate::error::{Error, Result};
use crate::kernels::{self, Bags, Level, LevelsView, Output, Rows, Scales};
use crate::tensor::{Dtype, Tensor};
use half::f16;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Type of the stored numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Number {
    /// IEEE half precision.
    Float16,
    /// The upper half of a float32.
    Bfloat16,
    /// 8-bit levels.
    Int8,
    /// 4-bit levels.
    Int4,
    /// 2-bit levels.
    Int2,
}

impl Number {
    /// Bits of one stored number.
    pub fn bits(self) -> u32 {
        match self {
            Number::Float16 | Number::Bfloat16 => 16,
            Number::Int8 => 8,
            Number::Int4 => 4,
            Number::Int2 => 2,
        }
    }

    /// True for the float types, which need no scales.
    pub fn is_float(self) -> bool {
        self.bits() == 16
    }

    fn level(self) -> Level {
        match self {
            Number::Float16 => Level::F16,
            Number::Bfloat16 => Level::Bf16,
            Number::Int8 => Level::U8,
            Number::Int4 => Level::U4,
            Number::Int2 => Level::U2,
        }
    }
}

/// What shares a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Granularity {
    /// The values of a row.
    Row,
    /// The values of a column.
    Column,
    /// Runs of `block_size` values of a row; the last one may be shorter.
    Block,
}

/// The description of a `Levels` decoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LevelsSpec {
    /// Values in a row.
    pub dim: usize,
    /// Type of the stored numbers.
    pub dtype: Number,
    /// What shares a scale.
    pub granularity: Granularity,
    /// Values in a block, where blocks share scales.
    pub block_size: usize,
    /// Levels stand around zero: no offset is stored in rows.
    pub symmetric: bool,
    /// Power of two that the rows' float16 scales are multiplied by.
    pub scale_factor: f32,
    /// Power of two that the rows' float16 offsets are multiplied by.
    pub offset_factor: f32,
}

impl LevelsSpec {
    /// Values that share a pair inside a row, if pairs stand in rows.
    pub fn shared(&self) -> Option<usize> {
        match self.granularity {
            _ if self.dtype.is_float() => None,
            Granularity::Row => Some(self.dim),
            Granularity::Block => Some(self.block_size),
            Granularity::Column => None,
        }
    }

    /// Bytes of the packed numbers of a row, before its scales.
    pub fn level_bytes(&self) -> usize {
        bits::row_bytes(self.dim, self.dtype.bits())
    }

    /// Bytes of one scale, with its offset unless symmetric.
    pub fn pair_bytes(&self) -> usize {
        if self.symmetric {
            2
        } else {
            4
        }
    }

    /// Bytes of a row's code.
    pub fn row_bytes(&self) -> usize {
        let pairs = self.shared().map_or(0, |size| self.dim.div_ceil(size));
        self.level_bytes() + pairs * self.pair_bytes()
    }
}

/// Small numbers with scales per row, block or column.
#[derive(Clone)]
pub struct Levels {
    spec: LevelsSpec,
    /// Scale and offset of each column, where columns share scales.
    columns: Option<(Tensor, Tensor)>,
}

impl Levels {
    /// The form's name.
    pub const FORM: &'static str = "levels";

    /// A decoder from its description; `columns` holds scale and offset of each column and is needed where columns
    /// share scales.
    pub fn new(spec: LevelsSpec, columns: Option<(&[f32], &[f32])>) -> Result<Self> {
        let tensors = match columns {
            None => Vec::new(),
            Some((scale, offset)) => vec![
                Tensor::of_floats("scale", Dtype::F32, vec![spec.dim], scale)?,
                Tensor::of_floats("offset", Dtype::F32, vec![spec.dim], offset)?,
            ],
        };
        Levels::from_parts(spec, &tensors)
    }

    pub(super) fn from_parts(spec: LevelsSpec, tensors: &[Tensor]) -> Result<Self> {
        let bad = |found: String, expected: &str| Err(Error::shape("the decoder's description", found, expected));
        if spec.dim == 0 || spec.dim > 1 << 24 {
            return bad(format!("dim {}", spec.dim), "1 to 16777216 columns");
        }
        if spec.block_size == 0 {
            return bad("block_size 0".into(), "at least 1");
        }
        for factor in [spec.scale_factor, spec.offset_factor] {
            if !(factor.is_finite() && factor > 0.0) {
                return bad(format!("factor {factor}"), "a positive number");
            }
        }
        let by_column = spec.granularity == Granularity::Column && !spec.dtype.is_float();
        if tensors.len() != if by_column { 2 } else { 0 } {
            return bad(format!("{} tensors", tensors.len()), "scale and offset if columns share scales, else none");
        }
        let column = |name| take(tensors, name, Some(Dtype::F32), &[spec.dim]).cloned();
        let columns = if by_column { Some((column("scale")?, column("offset")?)) } else { None };
        Ok(Levels { spec, columns })
    }

    /// The description.
    pub fn spec(&self) -> &LevelsSpec {
        &self.spec
    }

    /// Scale and offset of each column, where columns share scales.
    pub fn columns(&self) -> Option<(&[f32], &[f32])> {
        self.columns.as_ref().map(|(scale, offset)| (scale.floats(), offset.floats()))
    }

    /// Values in a row.
    pub fn dim(&self) -> usize {
        self.spec.dim
    }

    /// Bytes of a row's code.
    pub fn row_bytes(&self) -> usize {
        self.spec.row_bytes()
    }

    fn view(&self) -> LevelsView<'_> {
        let spec = &self.spec;
        let scales = match (&self.columns, spec.shared()) {
            (Some((scale, offset)), _) => Scales::Columns { scale: scale.floats(), offset: offset.floats() },
            (None, None) => Scales::None,
            (None, Some(block)) => Scales::Row {
                block,
                symmetric: spec.symmetric,
                scale_factor: spec.scale_factor,
                offset_factor: spec.offset_factor,
            },
        };
        LevelsView { dim: spec.dim, row_bytes: self.row_bytes(), level: spec.dtype.level(), scales }
    }
}

impl Form for Levels {
    fn name(&self) -> &'static str {
        Levels::FORM
    }

    fn dim(&self) -> usize {
        self.spec.dim
    }

    fn row_bytes(&self) -> usize {
        self.spec.row_bytes()
    }

    fn decode_floats(&self, rows: &Rows, out: &mut [f32]) {
        self.decode(rows, out.into());
    }

    fn decode(&self, rows: &Rows, out: Output) {
        (kernels::best().lookup_levels)(&self.view(), rows, out);
    }

    fn pool(&self, bags: &Bags, out: &mut [f32]) {
        (kernels::best().pool_levels)(&self.view(), bags, out);
    }

    fn tensors(&self) -> Vec<Tensor> {
        self.columns.iter().flat_map(|(scale, offset)| [scale.clone(), offset.clone()]).collect()
    }

    fn spec(&self) -> Value {
        serde_json::to_value(&self.spec).unwrap_or_default()
    }

    fn with_tensors(&self, tensors: &[Tensor]) -> Result<Decoder> {
        Ok(Decoder::Levels(Levels::from_parts(self.spec.clone(), tensors)?))
    }

    fn bad_row(&self, codes: &[u8]) -> Option<usize> {
        let brain = self.spec.dtype == Number::Bfloat16;
        let finite = |bytes: &[u8]| match brain {
            true => half::bf16::from_le_bytes([bytes[0], bytes[1]]).is_finite(),
            false => f16::from_le_bytes([bytes[0], bytes[1]]).is_finite(),
        };
        let from = if self.spec.dtype.is_float() { 0 } else { self.spec.level_bytes() };
        codes.chunks(self.row_bytes()).position(|row| !row[from..].chunks(2).all(finite))
    }
}
