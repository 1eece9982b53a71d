//! Form `linear`: a mean row, and the rows of another decoder through a linear map.

use super::{inner_tensors, outer_tensors, take, Budget, Decoder, Form, Metric, Scorer};
use crate::algo::linear::{transpose, Hadamard, Projection};
use crate::algo::nearest::Columns;
use crate::error::{zeros, Error, Result};
use crate::kernels::Rows;
use crate::matrix::Matrix;
use crate::pool::Context;
use crate::tensor::{Buffer, Dtype, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::sync::{Arc, OnceLock};

/// The linear map from the inner decoder's rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Rotation {
    /// None: columns are the inner decoder's.
    None {},
    /// A random rotation made from its seed ([`Hadamard`]): nothing is stored.
    Hadamard {
        /// Its seed.
        seed: u64,
        /// Its rounds.
        rounds: usize,
    },
    /// A stored matrix: row `t` is what the inner column `t` stands for.
    Matrix {
        /// Its stored type.
        dtype: MatrixDtype,
    },
}

/// Type of a stored matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MatrixDtype {
    /// IEEE half precision: the default.
    Float16,
    /// Single precision.
    Float32,
    /// 8-bit integers with a float32 scale for each row.
    Int8,
}

/// The description of a `Linear` decoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearSpec {
    dim: usize,
    mean: bool,
    rotation: Rotation,
    inner: Map<String, Value>,
}

/// A mean row and a rotation, as they are stored.
#[derive(Clone)]
pub struct LinearMap {
    dim: usize,
    width: usize,
    mean: Option<Tensor>,
    rotation: Rotation,
    matrix: Vec<Tensor>,
    turned: Arc<OnceLock<Turn>>,
}

/// A rotation, ready for rows.
enum Turn {
    None,
    Hadamard(Hadamard),
    /// There, and back.
    Matrix(Projection, Projection),
}

/// Rows that are mapped at a time.
const BLOCK_ROWS: usize = 64;

/// Most rounds of random signs.
const MOST_ROUNDS: usize = 4;

impl LinearMap {
    /// A map of rows of `dim` columns; `matrix` holds the rows of a rotation that is stored.
    pub fn new(dim: usize, mean: Option<&[f32]>, rotation: Rotation, matrix: Option<&[f32]>) -> Result<Self> {
        let mut tensors = Vec::new();
        if let Some(mean) = mean {
            tensors.push(Tensor::of_floats("mean", Dtype::F32, vec![dim], mean)?);
        }
        let mut width = dim;
        if let (Rotation::Matrix { dtype }, Some(matrix)) = (&rotation, matrix) {
            width = matrix.len() / dim;
            tensors.extend(store(matrix, dim, *dtype)?);
        }
        LinearMap::from_tensors(dim, width, mean.is_some(), rotation, &tensors)
    }

    fn from_tensors(dim: usize, width: usize, mean: bool, rotation: Rotation, tensors: &[Tensor]) -> Result<Self> {
        let bad = |found: String, expected: &str| Err(Error::shape("the decoder's description", found, expected));
        let mean = if mean { Some(take(tensors, "mean", Some(Dtype::F32), &[dim])?.clone()) } else { None };
        let mut matrix = Vec::new();
        match &rotation {
            Rotation::Matrix { dtype } => {
                matrix.push(take(tensors, "rotation", Some(dtype.dtype()), &[width, dim])?.clone());
                if *dtype == MatrixDtype::Int8 {
                    matrix.push(take(tensors, "rotation.scale", Some(Dtype::F32), &[width])?.clone());
                }
            }
            _ if width != dim => return bad(format!("{width} inner columns for {dim}"), "as many, or a matrix"),
            Rotation::Hadamard { rounds, .. } if *rounds == 0 || *rounds > MOST_ROUNDS => {
                return bad(format!("{rounds} rounds"), "1 to 4 rounds");
            }
            _ => {}
        }
        Ok(LinearMap { dim, width, mean, rotation, matrix, turned: Arc::default() })
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.mean.iter().chain(&self.matrix)
    }

    /// Columns after the map.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The mean row, where there is one.
    pub fn mean(&self) -> Option<&[f32]> {
        self.mean.as_ref().map(Tensor::floats)
    }

    /// The rows of the stored matrix as they are read, where there is one.
    pub fn matrix(&self) -> Option<Vec<f32>> {
        let mut values = self.matrix.first()?.to_floats();
        if let Some(scales) = self.matrix.get(1) {
            scale_rows(&mut values, scales.floats());
        }
        Some(values)
    }

    fn turn(&self) -> &Turn {
        if let Some(turn) = self.turned.get() {
            return turn;
        }
        // Made outside of the lock, which a process that is forked meanwhile would wait for.
        let turn = match (&self.rotation, self.matrix()) {
            (Rotation::Hadamard { seed, rounds }, _) => Turn::Hadamard(Hadamard::new(self.dim, *seed, *rounds)),
            (_, Some(matrix)) => {
                let back = Projection::new(&transpose(&matrix, self.dim), self.width);
                Turn::Matrix(Projection::new(&matrix, self.dim), back)
            }
            _ => Turn::None,
        };
        self.turned.get_or_init(|| turn)
    }

    /// Rows without their mean, turned; on the calling thread.
    pub fn project(&self, rows: &[f32]) -> Vec<f32> {
        let mut rows = rows.to_vec();
        if let Some(mean) = self.mean() {
            for row in rows.chunks_mut(mean.len()) {
                row.iter_mut().zip(mean).for_each(|(value, mean)| *value -= mean);
            }
        }
        self.turn_rows(rows)
    }

    /// [`LinearMap::project`] of all rows, on all threads.
    pub fn project_all(&self, rows: Matrix, ctx: &Context) -> Result<Vec<f32>> {
        let mut out = zeros("rotated rows", rows.rows().checked_mul(self.width))?;
        ctx.chunks(&mut out, BLOCK_ROWS * self.width, |block, out| {
            let start = block * BLOCK_ROWS;
            out.copy_from_slice(&self.project(rows.block(start..start + out.len() / self.width).data()));
            Ok(())
        })?;
        Ok(out)
    }

    fn turn_rows(&self, mut rows: Vec<f32>) -> Vec<f32> {
        match self.turn() {
            Turn::None => rows,
            Turn::Hadamard(rotation) => {
                rows.chunks_mut(self.dim).for_each(|row| rotation.turn(row));
                rows
            }
            Turn::Matrix(there, _) => {
                let rows = Columns::contiguous(&rows, self.dim);
                let mut out = vec![0f32; rows.rows() * self.width];
                there.apply(rows, &mut out);
                out
            }
        }
    }
}

/// A mean row plus another decoder's rows through a linear map.
#[derive(Clone)]
pub struct Linear {
    map: LinearMap,
    inner: Decoder,
}

impl Linear {
    /// The form's name.
    pub const FORM: &'static str = "linear";

    /// A decoder whose rows go through a map.
    pub fn new(map: LinearMap, inner: Decoder) -> Result<Self> {
        if inner.dim() != map.width {
            let found = format!("{} inner columns", inner.dim());
            return Err(Error::shape("the decoder", found, format!("{}, as the map has", map.width)));
        }
        Ok(Linear { map, inner })
    }

    pub(super) fn from_parts(spec: LinearSpec, tensors: &[Tensor], budget: &mut Budget) -> Result<Self> {
        let bad = |found: String, expected: &str| Err(Error::shape("the decoder's description", found, expected));
        if spec.dim == 0 || spec.dim > 1 << 24 {
            return bad(format!("dim {}", spec.dim), "1 to 16777216 columns");
        }
        let inner = budget.inner(spec.inner, &inner_tensors(tensors, "inner."))?;
        if let Rotation::Hadamard { rounds, .. } = &spec.rotation {
            budget.spend(spec.dim, rounds.saturating_mul(2))?;
        }
        if !inner.rows_apart() {
            return bad(format!("the form {} inside", inner.form()), "a decoder whose rows stand apart");
        }
        let map = LinearMap::from_tensors(spec.dim, inner.dim(), spec.mean, spec.rotation, tensors)?;
        if tensors.len() != inner.tensors().len() + map.tensors().count() {
            return bad(format!("{} tensors", tensors.len()), "those of the inner decoder, the mean and the rotation");
        }
        Ok(Linear { map, inner })
    }

    /// The decoder inside.
    pub fn inner(&self) -> &Decoder {
        &self.inner
    }

    /// The mean and the rotation.
    pub fn map(&self) -> &LinearMap {
        &self.map
    }
}

/// Each row times its scale.
fn scale_rows(values: &mut [f32], scales: &[f32]) {
    let width = values.len() / scales.len();
    for (row, scale) in values.chunks_mut(width).zip(scales) {
        row.iter_mut().for_each(|value| *value *= scale);
    }
}

impl MatrixDtype {
    fn dtype(self) -> Dtype {
        match self {
            MatrixDtype::Float16 => Dtype::F16,
            MatrixDtype::Float32 => Dtype::F32,
            MatrixDtype::Int8 => Dtype::I8,
        }
    }
}

/// The tensors of a matrix.
fn store(matrix: &[f32], dim: usize, dtype: MatrixDtype) -> Result<Vec<Tensor>> {
    let shape = vec![matrix.len() / dim, dim];
    if dtype != MatrixDtype::Int8 {
        return Ok(vec![Tensor::of_floats("rotation", dtype.dtype(), shape, matrix)?]);
    }
    let (mut levels, mut scales) = (Vec::with_capacity(matrix.len()), Vec::new());
    for row in matrix.chunks(dim) {
        // Of few digits, so that 127 of it is exact and the scale is found again from the values.
        let scale = row.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
        let scale = f32::from_bits((scale.to_bits() + 0xfff) & !0xfff);
        let by = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        levels.extend(row.iter().map(|value| (value * by).round_ties_even().clamp(-127.0, 127.0) as i8 as u8));
        scales.push(scale);
    }
    let rows = shape[0];
    Ok(vec![
        Tensor::new("rotation", Dtype::I8, shape, Buffer::copy_of(&levels)?)?,
        Tensor::of_floats("rotation.scale", Dtype::F32, vec![rows], &scales)?,
    ])
}

impl Form for Linear {
    fn name(&self) -> &'static str {
        Linear::FORM
    }

    fn dim(&self) -> usize {
        self.map.dim
    }

    fn row_bytes(&self) -> usize {
        self.inner.row_bytes()
    }

    fn by_number(&self) -> bool {
        self.inner.by_number()
    }

    fn decode_floats(&self, rows: &Rows, out: &mut [f32]) {
        let (dim, width) = (self.map.dim, self.map.width);
        let turn = self.map.turn();
        let mut inner = match turn {
            Turn::Matrix(..) => vec![0f32; BLOCK_ROWS.min(rows.range.len()) * width],
            _ => Vec::new(),
        };
        for (block, out) in out.chunks_mut(BLOCK_ROWS * dim).enumerate() {
            let count = out.len() / dim;
            // What is written here is read again at once: not past the caches.
            let part = Rows { stream: false, ..rows.part(block * BLOCK_ROWS..block * BLOCK_ROWS + count) };
            match turn {
                Turn::None => self.inner.decode_rows(&part, (&mut *out).into()),
                Turn::Hadamard(rotation) => {
                    self.inner.decode_rows(&part, (&mut *out).into());
                    out.chunks_mut(dim).for_each(|row| rotation.turn_back(row));
                }
                Turn::Matrix(_, back) => {
                    let inner = &mut inner[..count * width];
                    self.inner.decode_rows(&part, (&mut *inner).into());
                    back.apply(Columns::contiguous(inner, width), out);
                }
            }
            if let Some(mean) = self.map.mean() {
                for row in out.chunks_mut(dim) {
                    row.iter_mut().zip(mean).for_each(|(value, mean)| *value += mean);
                }
            }
        }
    }

    fn scorer(&self, query: &[f32], metric: Metric) -> Option<Scorer> {
        // The product with a turned row is the turned query's with the row.
        if metric != Metric::InnerProduct {
            return None;
        }
        let mut scorer = self.inner.scorer(&self.map.turn_rows(query.to_vec()), metric)?;
        let mean = self.map.mean().unwrap_or_default();
        scorer.bias += mean.iter().zip(query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32;
        Some(scorer)
    }

    fn tensors(&self) -> Vec<Tensor> {
        outer_tensors(&self.inner, "inner.").into_iter().chain(self.map.tensors().cloned()).collect()
    }

    fn spec(&self) -> Value {
        let map = &self.map;
        let (mean, rotation) = (map.mean.is_some(), map.rotation.clone());
        let spec = LinearSpec { dim: map.dim, mean, rotation, inner: self.inner.describe() };
        serde_json::to_value(spec).unwrap_or_default()
    }

    fn with_tensors(&self, tensors: &[Tensor]) -> Result<Decoder> {
        let map = &self.map;
        let floats = |name: &str, shape: &[usize]| Ok(take(tensors, name, None, shape)?.to_floats());
        let mean: Option<Vec<f32>> = map.mean.as_ref().map(|_| floats("mean", &[map.dim])).transpose()?;
        let mut matrix = None;
        if !map.matrix.is_empty() {
            let mut values = floats("rotation", &[map.width, map.dim])?;
            if map.matrix.len() > 1 {
                scale_rows(&mut values, &floats("rotation.scale", &[map.width])?);
            }
            matrix = Some(values);
        }
        let map = LinearMap::new(map.dim, mean.as_deref(), map.rotation.clone(), matrix.as_deref())?;
        let inner = self.inner.with_tensors(&inner_tensors(tensors, "inner."))?;
        Ok(Decoder::Linear(Linear::new(map, inner)?.into()))
    }

    fn bad_row(&self, codes: &[u8]) -> Option<usize> {
        self.inner.bad_row(codes)
    }
}
