//! The weighted sums of each cluster's rows, in float64 and in an order that does not depend on threads.

use super::{KMeans, Metric, Rows};
use crate::error::Result;
use crate::pool::Context;
use std::ops::Range;

/// Rows that are summed one after the other; a cluster of more rows has several such sums, which are added in order.
const PIECE: usize = 4096;

/// Clusters whose sums one task looks after.
const GROUP: usize = 16;

/// Rows between two looks at the context.
const LOOK: usize = 1 << 20;

/// What each cluster adds up to.
pub(super) struct Sums {
    /// `[sum of weight, weighted sum of rows]` of each cluster.
    totals: Vec<f64>,
    stride: usize,
}

impl Sums {
    /// Nothing yet.
    pub(super) fn new(clusters: usize, width: usize) -> Self {
        Sums { totals: vec![0.0; clusters * (width + 1)], stride: width + 1 }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.totals.fill(0.0);
    }

    /// Adds each row of `order` to its cluster, or takes it away with a `sign` of -1.
    pub(super) fn add(&mut self, rows: &Rows, order: &Order, sign: f64, ctx: &Context) -> Result<()> {
        let stride = self.stride;
        ctx.chunks(&mut self.totals, GROUP * stride, |group, totals| {
            for (number, total) in totals.chunks_exact_mut(stride).enumerate() {
                let places = order.places(group * GROUP + number);
                add_rows(rows, &order.rows[places.start..places.end.min(places.start + PIECE)], sign, total);
            }
            Ok(())
        })?;
        let more = order.more_pieces();
        let mut sums = vec![0.0; more.len() * stride];
        ctx.chunks(&mut sums, stride, |piece, sum| {
            add_rows(rows, &order.rows[more[piece].1.clone()], sign, sum);
            Ok(())
        })?;
        for ((cluster, _), sum) in more.iter().zip(sums.chunks_exact(stride)) {
            self.totals[cluster * stride..][..stride].iter_mut().zip(sum).for_each(|(total, more)| *total += *more);
        }
        Ok(())
    }

    /// Moves the centres to the means of their clusters; those of clusters without rows that count stay. Sums of the
    /// latter are made exactly zero. Returns the squared shift of all centres together.
    pub(super) fn move_centers(
        &mut self,
        kmeans: &KMeans,
        counts: &[usize],
        centers: &mut [f32],
        ctx: &Context,
    ) -> Result<f64> {
        let stride = self.stride;
        let mut tasks: Vec<_> = self
            .totals
            .chunks_mut(GROUP * stride)
            .zip(centers.chunks_mut(GROUP * (stride - 1)))
            .zip(counts.chunks(GROUP))
            .map(|((totals, centers), counts)| (totals, centers, counts, 0f64))
            .collect();
        ctx.chunks(&mut tasks, 1, |_, task| {
            let (totals, centers, counts, shift) = &mut task[0];
            let clusters = totals.chunks_exact_mut(stride).zip(centers.chunks_exact_mut(stride - 1));
            for ((total, center), count) in clusters.zip(*counts) {
                match count {
                    0 => total.fill(0.0),
                    _ => *shift += kmeans.move_center(total, center),
                }
            }
            Ok(())
        })?;
        Ok(tasks.iter().map(|task| task.3).sum())
    }
}

impl KMeans<'_> {
    /// Turns `[sum of weight, weighted sum of rows]` into a centre, which stays as it is where there is none. Returns its
    /// squared shift.
    pub(super) fn move_center(&self, total: &[f64], center: &mut [f32]) -> f64 {
        let divisor = match self.metric {
            Metric::Euclidean => total[0],
            Metric::Cosine => total[1..].iter().map(|v| v * v).sum::<f64>().sqrt(),
        };
        let mut shift = 0.0;
        if divisor > 0.0 {
            for (center, sum) in center.iter_mut().zip(&total[1..]) {
                let mean = (sum / divisor) as f32;
                shift += (f64::from(mean) - f64::from(*center)).powi(2);
                *center = mean;
            }
        }
        shift
    }
}

/// Rows in the order of their clusters, and within a cluster in the order in which they came.
pub(super) struct Order {
    rows: Vec<u32>,
    starts: Vec<usize>,
}

impl Order {
    /// `(row, cluster)` of each row.
    pub(super) fn new(pairs: impl Iterator<Item = (u32, u32)> + Clone, clusters: usize, ctx: &Context) -> Result<Self> {
        let mut starts = vec![0; clusters + 1];
        let mut count = 0;
        for (_, cluster) in pairs.clone() {
            starts[cluster as usize + 1] += 1;
            count += 1;
            if count % LOOK == 0 {
                ctx.check()?;
            }
        }
        for cluster in 0..clusters {
            starts[cluster + 1] += starts[cluster];
        }
        let (mut next, mut rows) = (starts.clone(), vec![0; count]);
        for (number, (row, cluster)) in pairs.enumerate() {
            rows[next[cluster as usize]] = row;
            next[cluster as usize] += 1;
            if number % LOOK == 0 {
                ctx.check()?;
            }
        }
        Ok(Order { rows, starts })
    }

    fn places(&self, cluster: usize) -> Range<usize> {
        self.starts[cluster]..self.starts[cluster + 1]
    }

    /// The rows of a cluster.
    pub(super) fn of(&self, cluster: usize) -> &[u32] {
        &self.rows[self.places(cluster)]
    }

    /// `(cluster, places)` of what clusters have beyond [`PIECE`] rows, in pieces of at most that.
    fn more_pieces(&self) -> Vec<(usize, Range<usize>)> {
        let of_cluster = |cluster: usize| {
            let Range { start, end } = self.places(cluster);
            (start + PIECE..end).step_by(PIECE).map(move |from| (cluster, from..end.min(from + PIECE)))
        };
        (0..self.starts.len() - 1).flat_map(of_cluster).collect()
    }
}

/// Adds `sign` times the rows to `[sum of weight, weighted sum of rows]`.
pub(super) fn add_rows(rows: &Rows, chosen: &[u32], sign: f64, total: &mut [f64]) {
    let (total_weight, sums) = total.split_at_mut(1);
    for row in chosen {
        let pull = sign * rows.pull(*row as usize);
        total_weight[0] += pull;
        for (sum, value) in sums.iter_mut().zip(rows.x.row(*row as usize)) {
            *sum += pull * f64::from(*value);
        }
    }
}
