//! Magnitude pruning: a row keeps its largest values, as many as every other row, and the rest become zero.

use super::scales::{too_large, Scales};
use super::{Encoder, Learned, Quantizer};
use crate::bits;
use crate::decoder::{Decoder, Kept, Places, ScaleDtype, Sparse, SparseSpec};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Sample};
use crate::pool::Context;
use serde::{Deserialize, Serialize};

/// Parameters of magnitude pruning.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SparseQuantizer {
    density: f64,
    dtype: Kept,
}

impl Default for SparseQuantizer {
    fn default() -> Self {
        SparseQuantizer { density: 0.1, dtype: Kept::Float16 }
    }
}

/// Largest integer.
const TOP: f32 = 127.0;

/// Values that one task measures.
const BLOCK: usize = 1 << 16;

impl SparseQuantizer {
    /// Values that a row of `dim` keeps.
    fn kept(&self, dim: usize) -> usize {
        ((self.density * dim as f64).round() as usize).clamp(1, dim)
    }

    /// How float16 values, or the scales of integers, are stored where the largest value has this magnitude.
    fn scales(&self, largest: f32) -> Scales {
        let largest = if self.dtype == Kept::Int8 { largest / TOP } else { largest };
        Scales::new(ScaleDtype::Float16, if self.dtype == Kept::Float32 { 0.0 } else { largest })
    }

    fn decoder(&self, dim: usize, scales: Scales) -> Result<Decoder> {
        Ok(Decoder::Sparse(Sparse::new(SparseSpec::new(dim, self.kept(dim), self.dtype, scales.factor))?))
    }
}

/// The columns of the largest magnitudes of a row, rising; of equals the lowest columns.
fn largest(row: &[f32], kept: usize, columns: &mut Vec<u32>) {
    columns.clear();
    columns.extend(0..row.len() as u32);
    let order = |a: &u32, b: &u32| {
        let (x, y) = (row[*a as usize].abs(), row[*b as usize].abs());
        y.total_cmp(&x).then(a.cmp(b))
    };
    if kept < row.len() {
        columns.select_nth_unstable_by(kept, order);
        columns.truncate(kept);
    }
    columns.sort_unstable();
}

/// Writes one row.
fn write(row: &[f32], columns: &[u32], spec: &SparseSpec, scales: Scales, code: &mut [u8]) -> Result<()> {
    let (places, values) = code.split_at_mut(spec.place_bytes());
    match spec.places {
        Places::Columns => bits::pack(columns.iter().copied(), spec.column_bits(), places),
        Places::Bitmap => {
            places.fill(0);
            columns.iter().for_each(|column| places[*column as usize / 8] |= 1 << (column % 8));
        }
    }
    let kept = columns.iter().map(|column| row[*column as usize]);
    match spec.dtype {
        Kept::Float32 => values.chunks_exact_mut(4).zip(kept).for_each(|(to, v)| to.copy_from_slice(&v.to_le_bytes())),
        Kept::Float16 => {
            for (to, value) in values.chunks_exact_mut(2).zip(kept) {
                scales.write(value, to)?;
            }
        }
        Kept::Int8 => {
            let reach = kept.clone().fold(0f32, |reach, value| reach.max(value.abs()));
            let scale = scales.round(reach / TOP);
            if !scale.is_finite() {
                return Err(too_large());
            }
            for (to, value) in values.iter_mut().zip(kept) {
                let level = if scale > 0.0 { (value / scale).round_ties_even().clamp(-TOP, TOP) } else { 0.0 };
                *to = level as i8 as u8;
            }
            scales.write(scale, &mut values[spec.kept..])?;
        }
    }
    Ok(())
}

impl Quantizer for SparseQuantizer {
    const NAME: &'static str = "sparse";
    const ABOUT: &'static str = "a row keeps its largest values, and the rest become zero";

    fn check(&self) -> Result<()> {
        if !(self.density > 0.0 && self.density <= 1.0) {
            return Err(Error::parameter("density", self.density, "must be above 0 and at most 1"));
        }
        Ok(())
    }

    fn blank(&self, _: usize, dim: usize) -> Result<Decoder> {
        self.decoder(dim, self.scales(1.0))
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        ctx.stage("scales", data.len() as u64);
        let values = data.rows.data();
        let parts = ctx.map(values.len().div_ceil(BLOCK), |index| {
            let part = &values[index * BLOCK..values.len().min((index + 1) * BLOCK)];
            Ok(part.iter().fold(0f32, |reach, value| reach.max(value.abs())))
        })?;
        let decoder = self.decoder(data.dim(), self.scales(parts.into_iter().fold(0f32, f32::max)))?;
        Ok(Learned { decoder, codes: None, n_iter: 1, notes: Vec::new() })
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, ctx: &Context) -> Result<Encoder<'a>> {
        let Decoder::Sparse(sparse) = decoder else {
            return Err(Error::shape("the decoder", decoder.form(), "the form sparse"));
        };
        let (spec, ctx) = (sparse.spec(), ctx.clone());
        let scales = Scales { dtype: ScaleDtype::Float16, factor: spec.scale_factor };
        Ok(Box::new(move |rows: Matrix, codes: &mut [u8]| {
            ctx.check()?;
            let mut columns = Vec::with_capacity(spec.dim);
            for (index, code) in codes.chunks_mut(spec.row_bytes()).enumerate() {
                let row = rows.row(index);
                largest(row, spec.kept, &mut columns);
                write(row, &columns, spec, scales, code)?;
            }
            Ok(())
        }))
    }
}
