//! Borrowed rows of `f32`, checked once at the door.

use crate::error::{Error, Result};
use crate::pool::Context;

/// The largest magnitude that is accepted: beyond it squared distances would overflow `f32`.
pub const MAX_MAGNITUDE: f32 = 1e15;

/// Rows of `f32`, row-major and contiguous.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    dim: usize,
}

impl<'a> Matrix<'a> {
    /// `data` as rows of `dim` values. Values are not looked at: see [`Matrix::check`].
    pub fn new(data: &'a [f32], dim: usize) -> Result<Self> {
        if dim == 0 || !data.len().is_multiple_of(dim) {
            return Err(Error::shape("X", format!("{} values", data.len()), format!("whole rows of {dim} values")));
        }
        Ok(Matrix { data, rows: data.len() / dim, dim })
    }

    /// Refuses NaN, infinity and values whose squares would overflow.
    pub fn check(&self) -> Result<()> {
        // Several rows at a time: the common case is one fast pass without a branch per value.
        let step = (1 << 14) / self.dim + 1;
        for (number, block) in self.data.chunks(step * self.dim).enumerate() {
            if block.iter().fold(true, |fine, v| fine & (v.abs() <= MAX_MAGNITUDE)) {
                continue;
            }
            let bad = |v: &f32| v.is_nan() || v.abs() > MAX_MAGNITUDE;
            let at = block.iter().position(bad).unwrap_or(0);
            let (row, column, value) = (number * step + at / self.dim, at % self.dim, block[at]);
            return Err(if value.is_finite() {
                Error::OutOfRange {
                    what: format!("X has {value:e} at row {row}, column {column}"),
                    why: format!("magnitudes above {MAX_MAGNITUDE:e} overflow squared distances in float32; scale the table down first"),
                }
            } else {
                Error::NotFinite { what: "X", row, column, value: if value.is_nan() { "NaN" } else { "infinity" } }
            });
        }
        Ok(())
    }

    /// [`Matrix::check`] on all threads.
    pub fn check_all(&self, ctx: &Context) -> Result<()> {
        let step = (1 << 20) / self.dim + 1;
        let fine = |block: &Matrix| block.data.iter().fold(true, |fine, v| fine & (v.abs() <= MAX_MAGNITUDE));
        let blocks = ctx.map(self.rows.div_ceil(step), |number| {
            Ok(fine(&self.block(number * step..self.rows.min((number + 1) * step))))
        })?;
        // Few rows are wrong, if any: the first of them is found by the check that names it.
        blocks.iter().all(|fine| *fine).then_some(()).map_or_else(|| self.check(), Ok)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// All values, row after row.
    pub fn data(&self) -> &'a [f32] {
        self.data
    }

    /// One row.
    pub fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.dim..(row + 1) * self.dim]
    }

    /// The rows of a range.
    pub fn block(&self, range: std::ops::Range<usize>) -> Matrix<'a> {
        Matrix { data: &self.data[range.start * self.dim..range.end * self.dim], rows: range.len(), dim: self.dim }
    }
}

/// The largest weight that is accepted: its product with a squared distance, summed over any table, stays finite.
const MAX_WEIGHT: f64 = 1e250;

/// Refuses weights that are negative, not finite or too large.
pub fn check_weights(weights: &[f64]) -> Result<()> {
    match weights.iter().position(|weight| !(0.0..=MAX_WEIGHT).contains(weight)) {
        None => Ok(()),
        Some(at) => {
            let expected = match weights[at] > MAX_WEIGHT && weights[at].is_finite() {
                true => format!("weights above {MAX_WEIGHT:e} overflow sums in float64: scale all of them down"),
                false => "weights must be finite and not negative".into(),
            };
            Err(Error::parameter(format!("sample_weight[{at}]"), format!("{:?}", weights[at]), expected))
        }
    }
}

/// Rows with optional weights: what a fit sees.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The rows.
    pub rows: Matrix<'a>,
    /// One weight a row, finite and not negative, with a positive sum.
    pub weights: Option<&'a [f64]>,
}

impl<'a> Sample<'a> {
    /// Rows with weights, both checked: at least one row, everything finite, weights not negative, not all zero.
    pub fn new(rows: Matrix<'a>, weights: Option<&'a [f64]>, ctx: &Context) -> Result<Self> {
        if rows.rows() == 0 {
            return Err(Error::shape("X", "0 rows", "at least 1 row"));
        }
        rows.check_all(ctx)?;
        if let Some(weights) = weights {
            if weights.len() != rows.rows() {
                let found = format!("{} values", weights.len());
                return Err(Error::shape("sample_weight", found, format!("one for each of the {} rows", rows.rows())));
            }
            check_weights(weights)?;
            if weights.iter().all(|w| *w == 0.0) {
                return Err(Error::parameter("sample_weight", "all zero", "at least one weight must be positive"));
            }
        }
        Ok(Sample { rows, weights })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.rows()
    }

    /// Never true: a sample has at least one row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Values in a row.
    pub fn dim(&self) -> usize {
        self.rows.dim()
    }

    /// Sum of the weights.
    pub fn total_weight(&self) -> f64 {
        self.weights.map_or(self.len() as f64, |weights| weights.iter().sum())
    }

    /// Weight of one row; 1 where no weights were given.
    pub fn weight(&self, row: usize) -> f64 {
        self.weights.map_or(1.0, |w| w[row])
    }
}
