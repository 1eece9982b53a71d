//! Form `levels`: a row is a list of small numbers, with scales per row, block or column.

use super::{take, Decoder, Form};
use crate::bits;
use crate::error::{Error, Result};
use crate::kernels::{self, Bags, Level, LevelsView, Meaning, Output, Rows, Scales, TABLE_ENTRIES};
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
    /// 6-bit levels.
    Int6,
    /// 5-bit levels.
    Int5,
    /// 4-bit levels.
    Int4,
    /// 3-bit levels.
    Int3,
    /// 2-bit levels.
    Int2,
    /// 1-bit places in the decoder's table.
    Table1,
    /// 2-bit places in the decoder's table.
    Table2,
    /// 3-bit places in the decoder's table.
    Table3,
    /// 4-bit places in the decoder's table.
    Table4,
    /// 5-bit places in the decoder's table.
    Table5,
    /// 6-bit places in the decoder's table.
    Table6,
    /// 7-bit places in the decoder's table.
    Table7,
    /// 8-bit places in the decoder's table.
    Table8,
    /// 4-bit places among sixteen float16 of the row or block itself.
    Free4,
}

impl Number {
    /// Bits of one stored number.
    pub fn bits(self) -> u32 {
        match self {
            Number::Float16 | Number::Bfloat16 => 16,
            Number::Int8 | Number::Table8 => 8,
            Number::Table7 => 7,
            Number::Int6 | Number::Table6 => 6,
            Number::Int5 | Number::Table5 => 5,
            Number::Int4 | Number::Table4 | Number::Free4 => 4,
            Number::Int3 | Number::Table3 => 3,
            Number::Int2 | Number::Table2 => 2,
            Number::Table1 => 1,
        }
    }

    /// True for the float types, which need no scales.
    pub fn is_float(self) -> bool {
        self.bits() == 16
    }

    /// True for places in the decoder's table.
    pub fn is_table(self) -> bool {
        !self.is_float() && Number::table(self.bits()) == Some(self)
    }

    /// Places of this many bits in a table, if they are 1 to 8.
    pub fn table(bits: u32) -> Option<Number> {
        use Number::{Table1, Table2, Table3, Table4, Table5, Table6, Table7, Table8};
        let all = [Table1, Table2, Table3, Table4, Table5, Table6, Table7, Table8];
        all.get((bits as usize).checked_sub(1)?).copied()
    }

    fn level(self) -> Level {
        match self {
            Number::Float16 => Level::F16,
            Number::Bfloat16 => Level::Bf16,
            Number::Int8 => Level::U8,
            Number::Int4 => Level::U4,
            Number::Int2 => Level::U2,
            other => Level::Bits(other.bits()),
        }
    }
}

/// How the scales of rows and blocks are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleDtype {
    /// IEEE half precision.
    #[default]
    Float16,
    /// One byte without a sign, four bits of it the exponent: the bits 6 to 13 of a float16.
    Float8,
}

impl ScaleDtype {
    fn is_float16(&self) -> bool {
        *self == ScaleDtype::Float16
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
    /// How the scales of rows and blocks are stored.
    #[serde(default, skip_serializing_if = "ScaleDtype::is_float16")]
    pub scale_dtype: ScaleDtype,
    /// Power of two that the rows' scales are multiplied by.
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
            Granularity::Block => Some(self.block_size.min(self.dim)),
            Granularity::Column => None,
        }
    }

    /// Bytes of the packed numbers of a row, before its scales.
    pub fn level_bytes(&self) -> usize {
        bits::row_bytes(self.dim, self.dtype.bits())
    }

    /// Bytes of what a block has behind the levels: a scale, with its offset unless symmetric, or its own levels.
    pub fn pair_bytes(&self) -> usize {
        match self.dtype {
            Number::Free4 => 2 * 16,
            _ if self.scale_dtype == ScaleDtype::Float8 => 1,
            _ if self.symmetric => 2,
            _ => 4,
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
    /// Scale and offset of each column, where columns share scales; tables have no offset.
    columns: Option<(Tensor, Option<Tensor>)>,
    /// What levels stand for, and the same with zeros behind it for the kernels.
    table: Option<(Tensor, Vec<f32>)>,
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

    /// A decoder whose levels are places in a table; `scale` holds the scale of each column and is needed where columns
    /// share scales.
    pub fn with_table(spec: LevelsSpec, table: &[f32], scale: Option<&[f32]>) -> Result<Self> {
        let mut tensors = vec![Tensor::of_floats("levels", Dtype::F32, vec![table.len()], table)?];
        if let Some(scale) = scale {
            tensors.push(Tensor::of_floats("scale", Dtype::F32, vec![spec.dim], scale)?);
        }
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
        let (table, free) = (spec.dtype.is_table(), spec.dtype == Number::Free4);
        if (table || free || spec.scale_dtype == ScaleDtype::Float8) && !spec.symmetric {
            return bad("symmetric false".into(), "true: tables, and scales of one byte, go without offsets");
        }
        if free && (by_column || spec.scale_dtype == ScaleDtype::Float8) {
            return bad("free levels".into(), "levels of rows or blocks, in float16");
        }
        let expected = usize::from(table) + if by_column { 2 - usize::from(table) } else { 0 };
        if tensors.len() != expected {
            return bad(format!("{} tensors", tensors.len()), "levels of a table; scale and offset of columns");
        }
        let tensor = |name, length| take(tensors, name, Some(Dtype::F32), &[length]).cloned();
        let table = if table { Some(tensor("levels", 1 << spec.dtype.bits())?) } else { None };
        let columns = match by_column {
            true if table.is_some() => Some((tensor("scale", spec.dim)?, None)),
            true => Some((tensor("scale", spec.dim)?, Some(tensor("offset", spec.dim)?))),
            false => None,
        };
        let table = table.map(|levels| {
            let mut padded = levels.floats().to_vec();
            padded.resize(padded.len().max(TABLE_ENTRIES), 0.0);
            (levels, padded)
        });
        Ok(Levels { spec, columns, table })
    }

    /// The description.
    pub fn spec(&self) -> &LevelsSpec {
        &self.spec
    }

    /// Scale and offset of each column, where columns share scales; no offsets with a table.
    pub fn columns(&self) -> Option<(&[f32], &[f32])> {
        let (scale, offset) = self.columns.as_ref()?;
        Some((scale.floats(), offset.as_ref().map_or(&[], |offset| offset.floats())))
    }

    /// What levels stand for, where they are places in a table.
    pub fn table(&self) -> Option<&[f32]> {
        self.table.as_ref().map(|(levels, _)| levels.floats())
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
        let scales = match (self.columns(), spec.shared()) {
            (Some((scale, offset)), _) => Scales::Columns { scale, offset },
            (None, None) => Scales::None,
            (None, Some(block)) => Scales::Row {
                block,
                symmetric: spec.symmetric,
                narrow: spec.scale_dtype == ScaleDtype::Float8,
                scale_factor: spec.scale_factor,
                offset_factor: spec.offset_factor,
            },
        };
        let meaning = match &self.table {
            Some((_, table)) => Meaning::Table(table),
            None if spec.dtype == Number::Free4 => Meaning::Own,
            None => Meaning::Number,
        };
        LevelsView { dim: spec.dim, row_bytes: self.row_bytes(), level: spec.dtype.level(), meaning, scales }
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
        let table = self.table.iter().map(|(levels, _)| levels);
        let columns = self.columns.iter().flat_map(|(scale, offset)| std::iter::once(scale).chain(offset));
        table.chain(columns).cloned().collect()
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
        if self.spec.scale_dtype == ScaleDtype::Float8 {
            return None;
        }
        let from = if self.spec.dtype.is_float() { 0 } else { self.spec.level_bytes() };
        codes.chunks(self.row_bytes()).position(|row| !row[from..].chunks(2).all(finite))
    }
}
