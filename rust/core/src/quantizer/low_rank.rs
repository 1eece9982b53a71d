//! Low rank: the leading principal components of the rows, each of which a scalar quantizer codes.
//!
//! Without quantization no map of so few components has a smaller error (Eckart and Young, 1936). Columns here are
//! components, whose scales differ: scales by column suit them.

use super::scalar::ScalarQuantizer;
use super::{within, Encoder, Front, Learned, Quantizer, Turning};
use crate::decoder::Decoder;
use crate::error::Result;
use crate::matrix::Sample;
use crate::pool::Context;
use serde::{Deserialize, Serialize};

/// Parameters of low rank.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LowRankQuantizer {
    n_components: usize,
    #[serde(flatten)]
    scalar: ScalarQuantizer,
}

impl Default for LowRankQuantizer {
    fn default() -> Self {
        LowRankQuantizer { n_components: 32, scalar: ScalarQuantizer::by_column() }
    }
}

impl Quantizer for LowRankQuantizer {
    const NAME: &'static str = "low-rank";
    const ABOUT: &'static str = "the leading principal components, each value a small number";
    const FRONT: Front = Front::rotated(Turning::Pca);

    fn check(&self) -> Result<()> {
        within("n_components", self.n_components, 1, 1 << 24)?;
        self.scalar.check()
    }

    fn blank(&self, rows: usize, dim: usize) -> Result<Decoder> {
        self.scalar.blank(rows, dim)
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        let mut learned = self.scalar.fit(data, ctx)?;
        if data.dim() < self.n_components {
            let (wanted, dim) = (self.n_components, data.dim());
            learned.notes.push(format!("{dim} features are fewer than {wanted} components: using {dim} components"));
        }
        Ok(learned)
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, ctx: &Context) -> Result<Encoder<'a>> {
        self.scalar.encoder(decoder, ctx)
    }

    fn usual_rotation(&self) -> Option<Turning> {
        Some(Turning::Pca)
    }

    fn columns(&self, dim: usize) -> usize {
        self.n_components.min(dim)
    }
}
