//! Rows and given centres: what a fitted k-means predicts.

use super::kmeans::{normalized, Metric};
use super::nearest::{Centroids, Columns};
use crate::error::{product, room, zeros, Result};
use crate::matrix::Matrix;
use crate::pool::Context;

/// Rows that one task compares with all centres: some milliseconds, and whole panels of rows.
fn block_rows(centers: Matrix) -> usize {
    ((1 << 26) / centers.data().len().max(1)).clamp(16, 256) / 16 * 16
}

/// Each row's nearest centre (the exact one, the first of equals) and its squared distance, or one minus the cosine.
pub fn predict(x: Matrix, centers: Matrix, metric: Metric, ctx: &Context) -> Result<(Vec<u32>, Vec<f32>)> {
    let mut labels = zeros("the labels", Some(x.rows()))?;
    let mut distances = zeros("the distances", Some(x.rows()))?;
    room("rows of length one", &[copy_bytes(x, metric)])?;
    let centroids = Centroids::new(centers.data(), centers.dim());
    with_metric(x, metric, ctx, |rows| {
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
    room("rows of length one", &[copy_bytes(x, metric)])?;
    let mut out = zeros("the distances to all centers", x.rows().checked_mul(centers.rows()))?;
    let centroids = Centroids::new(centers.data(), centers.dim());
    let block_rows = block_rows(centers);
    with_metric(x, metric, ctx, |rows| {
        ctx.chunks(&mut out, block_rows * centers.rows(), |block, out| {
            let first = block * block_rows;
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

/// Bytes of the copy that [`with_metric`] makes.
fn copy_bytes(x: Matrix, metric: Metric) -> Option<usize> {
    let values = if metric == Metric::Cosine { x.data().len() } else { 0 };
    product(&[values, 4])?.checked_add(product(&[x.rows(), 32])?)
}

fn with_metric<T>(x: Matrix, metric: Metric, ctx: &Context, work: impl FnOnce(Columns) -> Result<T>) -> Result<T> {
    match metric {
        Metric::Euclidean => work(x.into()),
        Metric::Cosine => work(normalized(x.into(), None, ctx)?.rows().x),
    }
}
