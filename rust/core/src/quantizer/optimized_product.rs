//! Optimized product quantization (Ge, He, Ke and Sun, 2013): product codes behind a rotation that is learned with them.
//!
//! The product quantizer does it all; here is only the name, and the defaults of what stands before it.

use super::product::ProductQuantizer;
use super::{Encoder, Front, Learned, Quantizer, Turning};
use crate::decoder::Decoder;
use crate::error::Result;
use crate::matrix::Sample;
use crate::pool::Context;
use serde::{Deserialize, Serialize};

/// Parameters of product quantization.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OptimizedProductQuantizer(ProductQuantizer);

impl Quantizer for OptimizedProductQuantizer {
    const NAME: &'static str = "optimized-product";
    const ABOUT: &'static str = "product codes of rows that were turned as suits them best";
    const FRONT: Front = Front::rotated(Turning::Learned);

    fn check(&self) -> Result<()> {
        self.0.check()
    }

    fn blank(&self, rows: usize, dim: usize) -> Result<Decoder> {
        self.0.blank(rows, dim)
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        self.0.fit(data, ctx)
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, ctx: &Context) -> Result<Encoder<'a>> {
        self.0.encoder(decoder, ctx)
    }

    fn usual_rotation(&self) -> Option<Turning> {
        self.0.usual_rotation()
    }

    fn components(&self, variances: &[f64]) -> Vec<usize> {
        self.0.components(variances)
    }

    fn learn_rotation(&self, data: Sample, ctx: &Context) -> Result<Vec<f32>> {
        self.0.learn_rotation(data, ctx)
    }
}
