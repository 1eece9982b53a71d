//! What can stand before and behind every quantizer, through parameters that all kinds share: the mean and a rotation are
//! taken off first; another quantizer may code what is left over.

use super::{AnyQuantizer, Encoder, Kind, Learned, Quantizer};
use crate::algo::linear;
use crate::decoder::{Decoder, Join, Joining, Linear, LinearMap, MatrixDtype, Rotation};
use crate::error::{product, room, Error, Result};
use crate::kernels::Ids;
use crate::matrix::{Matrix, Sample};
use crate::pool::Context;
use crate::rng::mix;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::sync::Arc;

/// Which rotation stands before a quantizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Turning {
    /// What suits the quantizer's other parameters.
    Auto,
    /// A random one that costs little and is made from its seed.
    Random,
    /// Any random one, stored as a matrix.
    Dense,
    /// The principal components.
    Pca,
    /// The one that the quantizer learns.
    Learned,
}

/// Another quantizer for what a quantizer leaves over.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Behind {
    kind: String,
    #[serde(default)]
    parameters: Map<String, Value>,
}

/// The parameters that all kinds share.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Front {
    /// Whether the mean row is taken off, and kept in the decoder.
    pub center: bool,
    /// The rotation of the rows.
    pub rotation: Option<Turning>,
    /// How a rotation that is no random one is stored.
    pub rotation_dtype: MatrixDtype,
    /// What codes the difference that is left.
    pub residual: Option<Behind>,
}

/// Rounds of random signs: with two, rows of one value would still show.
const ROUNDS: usize = 3;

impl Front {
    /// Nothing before, nothing behind.
    pub const NONE: Front =
        Front { center: false, rotation: None, rotation_dtype: MatrixDtype::Float16, residual: None };

    /// Nothing but the mean and a rotation.
    pub const fn rotated(rotation: Turning) -> Front {
        Front { center: true, rotation: Some(rotation), ..Front::NONE }
    }

    /// The shared parameters among others.
    pub(super) fn split(parameters: Map<String, Value>) -> (Map<String, Value>, Map<String, Value>) {
        const NAMES: [&str; 4] = ["center", "rotation", "rotation_dtype", "residual"];
        parameters.into_iter().partition(|(name, _)| NAMES.contains(&name.as_str()))
    }
}

/// A seed that JSON's numbers hold everywhere, always of 16 digits so that files are as large as estimated.
fn short(seed: u64) -> u64 {
    1 << 51 | mix(seed) >> 13
}

/// A quantizer with what stands before and behind it.
pub struct Fronted<Q> {
    front: Front,
    quantizer: Q,
    behind: Option<Arc<dyn AnyQuantizer>>,
}

impl<Q: Quantizer> Fronted<Q> {
    pub(super) fn new(front: Front, quantizer: Q) -> Result<Self> {
        let make = |behind: &Behind| Kind::find(&behind.kind)?.make(behind.parameters.clone());
        let behind = front.residual.as_ref().map(make).transpose()?;
        Ok(Fronted { front, quantizer, behind })
    }

    fn rotation(&self) -> Option<Turning> {
        match self.front.rotation {
            Some(Turning::Auto) => self.quantizer.usual_rotation(),
            rotation => rotation,
        }
    }

    /// Whether rows reach the quantizer as they are.
    fn plain(&self) -> bool {
        !self.front.center && self.rotation().is_none()
    }

    /// A matrix of very many columns is refused, a rotation that is not stored is not.
    fn check_columns(&self, dim: usize) -> Result<()> {
        match self.rotation() {
            Some(Turning::Dense | Turning::Pca | Turning::Learned) => linear::check_columns(dim),
            _ => Ok(()),
        }
    }

    fn stored(&self) -> Rotation {
        Rotation::Matrix { dtype: self.front.rotation_dtype }
    }

    /// The map of these rows.
    fn map(&self, data: Sample, ctx: &Context) -> Result<LinearMap> {
        let dim = data.dim();
        self.check_columns(dim)?;
        let mean = if self.front.center { Some(linear::mean(data, ctx)?) } else { None };
        let mean = mean.as_deref();
        let (rotation, matrix) = match self.rotation() {
            None | Some(Turning::Auto) => (Rotation::None {}, None),
            Some(Turning::Random) => (Rotation::Hadamard { seed: short(ctx.seed), rounds: ROUNDS }, None),
            Some(Turning::Dense) => (self.stored(), Some(linear::random_rotation(dim, ctx.seed, ctx)?)),
            Some(turning) => {
                ctx.stage("rotation", 0);
                let centred = LinearMap::new(dim, mean, Rotation::None {}, None)?.project_all(data.rows, ctx)?;
                let data = Sample { rows: Matrix::new(&centred, dim)?, weights: data.weights };
                let matrix = match turning {
                    Turning::Learned => self.quantizer.learn_rotation(data, ctx)?,
                    _ => self.principal(data, ctx)?,
                };
                (self.stored(), Some(matrix))
            }
        };
        LinearMap::new(dim, mean, rotation, matrix.as_deref())
    }

    /// The principal components that the quantizer takes.
    fn principal(&self, data: Sample, ctx: &Context) -> Result<Vec<f32>> {
        let moments = linear::second_moments(data, ctx)?;
        let (variances, vectors) = linear::eigen(&moments, data.dim(), ctx)?;
        let chosen = self.quantizer.components(&variances);
        Ok(chosen.into_iter().flat_map(|at| &vectors[at * data.dim()..(at + 1) * data.dim()]).copied().collect())
    }

    /// The map of rows that are not there yet.
    fn blank_map(&self, dim: usize) -> Result<LinearMap> {
        self.check_columns(dim)?;
        room("the decoder", &[product(&[dim, 64])])?;
        let mean = vec![0f32; dim];
        let mean = self.front.center.then_some(&mean[..]);
        let (rotation, width) = match self.rotation() {
            None | Some(Turning::Auto) => (Rotation::None {}, 0),
            Some(Turning::Random) => (Rotation::Hadamard { seed: short(0), rounds: ROUNDS }, 0),
            Some(Turning::Dense | Turning::Learned) => (self.stored(), dim),
            Some(Turning::Pca) => (self.stored(), self.quantizer.columns(dim)),
        };
        let matrix = crate::error::zeros("a rotation", width.checked_mul(dim))?;
        LinearMap::new(dim, mean, rotation, (width > 0).then_some(&matrix[..]))
    }

    /// What a decoder of rows is with this map before it.
    fn mapped(&self, map: LinearMap, inner: Decoder) -> Result<Decoder> {
        Ok(Decoder::Linear(Linear::new(map, inner)?.into()))
    }

    /// Prepares encoding by the quantizer and what stands before it.
    fn first_encoder<'a>(&'a self, decoder: &'a Decoder, ctx: &Context) -> Result<Encoder<'a>> {
        if self.plain() {
            return self.quantizer.encoder(decoder, ctx);
        }
        let Decoder::Linear(linear) = decoder else {
            return Err(Error::shape("the decoder", decoder.form(), "the form linear"));
        };
        let encode = self.quantizer.encoder(linear.inner(), ctx)?;
        Ok(Box::new(move |rows: Matrix, codes: &mut [u8]| {
            let mapped = linear.map().project(rows.data());
            encode(Matrix::new(&mapped, linear.map().width())?, codes)
        }))
    }

    fn fit_first(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        if self.plain() {
            return self.quantizer.fit(data, ctx);
        }
        let map = self.map(data, ctx)?;
        let mapped = map.project_all(data.rows, ctx)?;
        let mapped = Sample { rows: Matrix::new(&mapped, map.width())?, weights: data.weights };
        let learned = self.quantizer.fit_components(mapped, data.dim(), ctx)?;
        Ok(Learned { decoder: self.mapped(map, learned.decoder)?, ..learned })
    }
}

/// The difference of rows and what their codes decode to.
fn left_over(rows: Matrix, codes: &[u8], decoder: &Decoder) -> Vec<f32> {
    let mut left = vec![0f32; rows.data().len()];
    decoder.decode(codes, Ids::Range { start: 0, len: rows.rows() }, &mut left);
    left.iter_mut().zip(rows.data()).for_each(|(left, value)| *left = value - *left);
    left
}

impl<Q: Quantizer> AnyQuantizer for Fronted<Q> {
    fn blank(&self, rows: usize, dim: usize) -> Result<Decoder> {
        let first = match self.plain() {
            true => self.quantizer.blank(rows, dim)?,
            false => {
                let map = self.blank_map(dim)?;
                let inner = self.quantizer.blank(rows, map.width())?;
                self.mapped(map, inner)?
            }
        };
        match &self.behind {
            None => Ok(first),
            Some(behind) => Ok(Decoder::Join(Join::new(Joining::Sum, vec![first, behind.blank(rows, dim)?])?)),
        }
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        let first = self.fit_first(data, ctx)?;
        let Some(behind) = &self.behind else { return Ok(first) };
        let mut left = crate::error::zeros("what is left of the rows", Some(data.rows.data().len()))?;
        let encode = self.first_encoder(&first.decoder, ctx)?;
        let (dim, bytes) = (data.dim(), first.decoder.row_bytes());
        ctx.chunks(&mut left, super::BLOCK_ROWS * dim, |block, left| {
            let start = block * super::BLOCK_ROWS;
            let rows = data.rows.block(start..start + left.len() / dim);
            let mut codes = vec![0u8; rows.rows() * bytes];
            encode(rows, &mut codes)?;
            left.copy_from_slice(&left_over(rows, &codes, &first.decoder));
            Ok(())
        })?;
        drop(encode);
        let left = Sample { rows: Matrix::new(&left, dim)?, weights: data.weights };
        let second = behind.fit(left, &ctx.with_seed(ctx.seed.wrapping_add(1)))?;
        let notes = first.notes.into_iter().chain(second.notes).collect();
        let decoder = Decoder::Join(Join::new(Joining::Sum, vec![first.decoder, second.decoder])?);
        Ok(Learned { decoder, codes: None, n_iter: first.n_iter.max(second.n_iter), notes })
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, ctx: &Context) -> Result<Encoder<'a>> {
        let Some(behind) = &self.behind else { return self.first_encoder(decoder, ctx) };
        let Decoder::Join(join) = decoder else {
            return Err(Error::shape("the decoder", decoder.form(), "the form join"));
        };
        let [first, second] = join.parts() else {
            return Err(Error::shape("the decoder", format!("{} parts", join.parts().len()), "two"));
        };
        let (encode, encode_left) = (self.first_encoder(first, ctx)?, behind.encoder(second, ctx)?);
        Ok(Box::new(move |rows: Matrix, codes: &mut [u8]| {
            let count = rows.rows();
            let mut before = vec![0u8; count * first.row_bytes()];
            let mut after = vec![0u8; count * second.row_bytes()];
            encode(rows, &mut before)?;
            encode_left(Matrix::new(&left_over(rows, &before, first), rows.dim())?, &mut after)?;
            let parts = before.chunks(first.row_bytes()).zip(after.chunks(second.row_bytes()));
            for (code, (a, b)) in codes.chunks_mut(first.row_bytes() + second.row_bytes()).zip(parts) {
                code[..a.len()].copy_from_slice(a);
                code[a.len()..].copy_from_slice(b);
            }
            Ok(())
        }))
    }

    fn parameters(&self) -> Map<String, Value> {
        let mut all = Map::new();
        for part in [serde_json::to_value(&self.quantizer), serde_json::to_value(&self.front)] {
            if let Ok(Value::Object(part)) = part {
                all.extend(part);
            }
        }
        all
    }
}
