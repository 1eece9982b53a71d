//! Rows and given centres: what a fitted k-means predicts.

use super::kmeans::{normalized, Metric};
use super::nearest::{Centroids, Columns};
use crate::error::{zeros, Result};
use crate::matrix::Matrix;
use crate::pool::Context;

/// Rows that one task compares with all centres.
const BLOCK: usize = 256;

/// Each row's nearest centre (the exact one, the first of equals) and its squared distance, or one minus the cosine.
pub fn predict(x: Matrix, centers: Matrix, metric: Metric, ctx: &Context) -> Result<(Vec<u32>, Vec<f32>)> {
    let (mut labels, mut distances) = (vec![0; x.rows()], vec![0.0; x.rows()]);
    let centroids = Centroids::new(centers.data(), centers.dim());
    with_metric(x, metric, |rows| -> Result<()> {
        centroids.nearest_exact(rows, &mut labels, Some(&mut distances), ctx)?;
        if metric == Metric::Cosine {
            for (row, (distance, label)) in distances.iter_mut().zip(&labels).enumerate() {
                let cosine: f32 = rows.row(row).iter().zip(centers.row(*label as usize)).map(|(a, b)| a * b).sum();
                *distance = (1.0 - cosine).max(0.0);
            }
        }
        Ok(())
    })?;
    Ok((labels, distances))
}

/// The distance of each row to every centre, or one minus the cosine: rows x centres.
pub fn transform(x: Matrix, centers: Matrix, metric: Metric, ctx: &Context) -> Result<Vec<f32>> {
    let mut out = zeros("the distances to all centers", x.rows().checked_mul(centers.rows()))?;
    let centroids = Centroids::new(centers.data(), centers.dim());
    with_metric(x, metric, |rows| {
        ctx.chunks(&mut out, BLOCK * centers.rows(), |block, out| {
            let first = block * BLOCK;
            let rows = rows.block(first..first + out.len() / centers.rows());
            match metric {
                Metric::Euclidean => {
                    centroids.distances_block(rows, out);
                    out.iter_mut().for_each(|d| *d = d.sqrt());
                }
                Metric::Cosine => {
                    centroids.dots_block(rows, out);
                    out.iter_mut().for_each(|d| *d = (1.0 - *d).max(0.0));
                }
            }
            Ok(())
        })
    })?;
    Ok(out)
}

fn with_metric<T>(x: Matrix, metric: Metric, work: impl FnOnce(Columns) -> T) -> T {
    match metric {
        Metric::Euclidean => work(x.into()),
        Metric::Cosine => work(normalized(x.into(), None).rows().x),
    }
}
