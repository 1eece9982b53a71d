//! Mini-batch k-means (Sculley, 2010).

use super::sums::{add_rows, Order};
use super::{KMeans, Rows, Run};
use crate::algo::nearest::Centroids;
use crate::error::Result;
use crate::pool::Context;
use crate::rng::Rng;

/// Batches without a better smoothed inertia before mini-batches stop.
const PATIENCE: usize = 10;

/// Centres with less than this part of the heaviest centre's count are dead.
const DEAD: f64 = 0.01;

/// The state of mini-batch k-means (Sculley, 2010).
struct MiniBatch {
    centers: Vec<f32>,
    /// Weight that each centre has seen.
    counts: Vec<f64>,
    /// Rows since dead centres were last looked for.
    since: usize,
    smoothed: Option<f64>,
    lowest: f64,
    waited: usize,
}

impl KMeans<'_> {
    pub(super) fn mini_batches(
        &self,
        rows: &Rows,
        centers: Vec<f32>,
        size: usize,
        tol: f64,
        rng: &mut Rng,
        ctx: &Context,
    ) -> Result<Run> {
        let (n, width) = (rows.x.rows(), rows.x.width());
        let counts = vec![0.0; centers.len() / width];
        let mut state = MiniBatch { centers, counts, since: 0, smoothed: None, lowest: f64::INFINITY, waited: 0 };
        let steps = (self.max_iter as u128 * n as u128).div_ceil(size as u128).min(usize::MAX as u128) as usize;
        let per_pass = n.div_ceil(size);
        let mut done = 0;
        while done < steps {
            ctx.check()?;
            let chosen: Vec<usize> = (0..size).map(|_| rng.below(n)).collect();
            let batch = rows.gather(&chosen, ctx)?;
            let (inertia, shift) = self.step(&mut state, &batch.rows(), rng, ctx)?;
            done += 1;
            if done % per_pass == 0 {
                ctx.advance(1);
            }
            // The first batch starts from seeds and says little.
            if done > 1 && state.settled(inertia, shift, tol, 2.0 * size as f64 / (n as f64 + 1.0)) {
                break;
            }
        }
        Ok(Run { centers: state.centers, labels: None, n_iter: done.div_ceil(per_pass) })
    }

    /// One batch: its mean inertia before, and the squared shift of the centres.
    fn step(&self, state: &mut MiniBatch, batch: &Rows, rng: &mut Rng, ctx: &Context) -> Result<(f64, f64)> {
        let (n, width) = (batch.x.rows(), batch.x.width());
        let (mut labels, mut distances) = (vec![0; n], vec![0.0; n]);
        Centroids::new(&state.centers, width).nearest(batch.x, &mut labels, Some(&mut distances), ctx)?;
        let before = state.centers.clone();
        let pairs = labels.iter().enumerate().map(|(row, label)| (row as u32, *label));
        let order = Order::new(pairs, state.counts.len(), ctx)?;
        ctx.chunks(&mut state.centers, width, |cluster, center| {
            let count = state.counts[cluster];
            let mut total = vec![count; width + 1];
            total[1..].iter_mut().zip(&*center).for_each(|(total, center)| *total = count * f64::from(*center));
            add_rows(batch, order.of(cluster), 1.0, &mut total);
            if total[0] > count {
                self.move_center(&total, center);
            }
            Ok(())
        })?;
        for (row, label) in labels.iter().enumerate() {
            state.counts[*label as usize] += batch.pull(row);
        }
        let shift = state.centers.iter().zip(&before).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
        state.revive(batch, rng);
        let weight: f64 = (0..n).map(|row| batch.pull(row)).sum();
        let inertia: f64 = (0..n).map(|row| batch.pull(row) * f64::from(distances[row])).sum();
        Ok((if weight > 0.0 { inertia / weight } else { 0.0 }, shift))
    }
}

impl MiniBatch {
    /// Now and then moves dead centres to rows of the batch, half the batch at most.
    fn revive(&mut self, batch: &Rows, rng: &mut Rng) {
        let (n, width) = (batch.x.rows(), batch.x.width());
        self.since += n;
        if self.since < 10 * self.counts.len() {
            return;
        }
        self.since = 0;
        let limit = DEAD * self.counts.iter().fold(0.0, |a: f64, b| a.max(*b));
        let mut dead: Vec<usize> = (0..self.counts.len()).filter(|cluster| self.counts[*cluster] < limit).collect();
        dead.sort_by(|a, b| self.counts[*a].total_cmp(&self.counts[*b]).then(a.cmp(b)));
        dead.truncate(n / 2);
        let alive = self.counts.iter().filter(|count| **count >= limit).fold(f64::INFINITY, |a, b| a.min(*b));
        let heavy: Vec<usize> = (0..n).filter(|row| batch.pull(*row) > 0.0).collect();
        for (cluster, place) in dead.iter().zip(rng.sample(heavy.len(), dead.len())) {
            self.centers[cluster * width..][..width].copy_from_slice(batch.x.row(heavy[place]));
            self.counts[*cluster] = alive;
        }
    }

    /// True once the centres stand still or the smoothed inertia has stopped falling.
    fn settled(&mut self, inertia: f64, shift: f64, tol: f64, alpha: f64) -> bool {
        let alpha = alpha.min(1.0);
        let smoothed = self.smoothed.map_or(inertia, |old| old * (1.0 - alpha) + inertia * alpha);
        self.smoothed = Some(smoothed);
        if smoothed < self.lowest {
            (self.lowest, self.waited) = (smoothed, 0);
        } else {
            self.waited += 1;
        }
        shift <= tol || self.waited >= PATIENCE
    }
}
