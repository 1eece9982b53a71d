//! Rows that cannot have changed their cluster, by the triangle inequality (Hamerly, 2010).
//!
//! Each row keeps a bound from above on the distance to its own centre and one from below on the distances to all
//! others. Centres that move loosen both by as much. While the bounds are further apart than float32 can err, the nearest
//! centre is the same, whether float32 or float64 looks for it, so that labels do not depend on what was spared.

use crate::algo::nearest::Centroids;

/// What is known of the first rows of a chunk: `lower.len()` of them.
#[derive(Default)]
pub(super) struct Bounds {
    upper: Vec<f32>,
    lower: Vec<f32>,
}

/// How far the centres moved in an update.
#[derive(Default)]
pub(super) struct Drift {
    of_center: Vec<f32>,
    /// The farthest move, of the centre `farthest`, and the farthest of all others.
    most: f32,
    farthest: u32,
    most_others: f32,
}

impl Drift {
    /// From the centres before and after.
    pub(super) fn new(before: &[f32], after: &[f32], width: usize) -> Self {
        let distance = |(a, b): (&[f32], &[f32])| up(squared(a, b).sqrt());
        let of_center: Vec<f32> = before.chunks_exact(width).zip(after.chunks_exact(width)).map(distance).collect();
        let mut drift = Drift::default();
        for (number, moved) in of_center.iter().enumerate() {
            if *moved > drift.most {
                (drift.most_others, drift.most, drift.farthest) = (drift.most, *moved, number as u32);
            } else {
                drift.most_others = drift.most_others.max(*moved);
            }
        }
        Drift { of_center, ..drift }
    }

    /// The farthest move of any centre but one.
    fn of_others(&self, label: u32) -> f32 {
        if label == self.farthest {
            self.most_others
        } else {
            self.most
        }
    }
}

impl Bounds {
    /// Rows that have bounds.
    pub(super) fn len(&self) -> usize {
        self.lower.len()
    }

    /// Keeps bounds of the first `count` rows, which are loose until [`Bounds::tighten`].
    pub(super) fn resize(&mut self, count: usize) {
        self.upper.resize(count, f32::INFINITY);
        self.lower.resize(count, 0.0);
    }

    /// Forgets what is known of a row: its lower bound leaves out the centre that it had.
    pub(super) fn forget(&mut self, row: usize) {
        if row < self.len() {
            (self.upper[row], self.lower[row]) = (f32::INFINITY, 0.0);
        }
    }

    /// Takes note of the scores of a row, see [`Centroids::scores_block`].
    pub(super) fn tighten(&mut self, row: usize, values: &[f32], lowest: f32, second: f32, centroids: &Centroids) {
        let norm = centroids.moved_norm(values);
        let error = 2.0 * centroids.error_at(norm.sqrt());
        let distance = |score: f32, error: f64| (norm + 2.0 * f64::from(score) + error).max(0.0).sqrt();
        self.upper[row] = up(distance(lowest, error));
        self.lower[row] = down(distance(second, -error));
    }

    /// Loosens the bounds by what the centres moved. The rows that may have changed their cluster go to `open`.
    pub(super) fn loosen(&mut self, labels: &[u32], drift: &Drift, centroids: &Centroids, open: &mut Vec<u32>) {
        open.clear();
        for (row, (upper, lower)) in self.upper.iter_mut().zip(&mut self.lower).enumerate() {
            *upper = up(f64::from(*upper) + f64::from(drift.of_center[labels[row] as usize]));
            *lower = down(f64::from(*lower) - f64::from(drift.of_others(labels[row]))).max(0.0);
            if !certain(*upper, *lower, centroids) {
                open.push(row as u32);
            }
        }
    }

    /// Measures the distance of an open row to its own centre. True if that is enough.
    pub(super) fn settles(&mut self, row: usize, squared_distance: f32, centroids: &Centroids) -> bool {
        // Differences, squares and sums of positive numbers are each rounded: at most once a column, and a few times more.
        let error = 1.0 + (centroids.width() + 16) as f64 * f64::from(f32::EPSILON);
        let distance = f64::from(squared_distance) * error + f64::from(f32::MIN_POSITIVE);
        self.upper[row] = self.upper[row].min(up(distance.sqrt()));
        certain(self.upper[row], self.lower[row], centroids)
    }
}

/// Whether the scores of a row's own centre and of any other differ by more than both can err.
fn certain(upper: f32, lower: f32, centroids: &Centroids) -> bool {
    let (upper, lower) = (f64::from(upper), f64::from(lower));
    lower * lower - upper * upper > 4.0 * centroids.error_at(upper + centroids.reach())
}

/// The next number of single precision that is not smaller.
fn up(value: f64) -> f32 {
    (value as f32).next_up()
}

/// The next number of single precision that is not larger.
fn down(value: f64) -> f32 {
    (value as f32).next_down()
}

fn squared(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
}
