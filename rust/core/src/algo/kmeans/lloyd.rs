//! Lloyd's iterations: rows go to their nearest centres, centres to the means of their rows.
//!
//! After the first iterations few rows change their cluster, so that sums are kept and only these rows are added and
//! taken away. All rows are summed anew where that is less work, after relocations, where weights differ much, every
//! [`RECOUNT`] iterations and when no row moves any more, so that rounding does not add up.

use super::pruning::{Bounds, Drift};
use super::sums::{Order, Sums};
use super::{chunk_rows, KMeans, Rows, Run};
use crate::algo::nearest::{Centroids, Columns};
use crate::error::Result;
use crate::pool::Context;

/// Iterations after which all rows are summed anew.
const RECOUNT: usize = 16;

/// Rows whose labels are compared while they are in the first-level cache.
const COMPARED: usize = 1024;

/// Multiply-adds of a row from which bounds are worth their upkeep, a few nanoseconds.
const PRUNABLE: usize = 8192;

/// Rows of a chunk that tell whether bounds would pay: where fewer than half of the rows stay open.
const PROBED: usize = 64;

/// The label of rows that have none yet.
const NONE: u32 = u32::MAX;

/// Rows that one task looks after, with all that is known of them.
#[derive(Default)]
struct Chunk<'a> {
    x: Columns<'a>,
    first: usize,
    labels: Vec<u32>,
    /// Row and former label of those that changed it, but not of those that had none.
    moved: Vec<(u32, u32)>,
    changes: usize,
    bounds: Bounds,
    /// Rows that the bounds leave open.
    open: Vec<u32>,
}

impl<'a> Chunk<'a> {
    fn new(x: Columns<'a>, first: usize) -> Self {
        Chunk { x, first, labels: vec![NONE; x.rows()], ..Chunk::default() }
    }

    /// Loosens the bounds by what the centres moved.
    fn loosen(&mut self, drift: &Drift, centroids: &Centroids) {
        self.bounds.loosen(&self.labels, drift, centroids, &mut self.open);
    }

    /// Gives each row its nearest centre, and keeps bounds of the first `keep` rows.
    fn assign(&mut self, centroids: &Centroids, exact: bool, keep: usize) {
        self.changes = 0;
        self.moved.clear();
        match self.bounds.len() == self.labels.len() && keep >= self.labels.len() {
            true => self.assign_open(centroids, exact),
            false => self.assign_all(centroids, exact, if exact { 0 } else { keep.min(self.labels.len()) }),
        }
    }

    fn assign_all(&mut self, centroids: &Centroids, exact: bool, keep: usize) {
        self.bounds.resize(keep);
        let mut found = [0; COMPARED];
        let (mut lowest, mut second) = ([0.0; COMPARED], [0.0; COMPARED]);
        for first in (0..self.labels.len()).step_by(COMPARED) {
            let count = COMPARED.min(self.labels.len() - first);
            let (x, scored) = (self.x.block(first..first + count), keep.saturating_sub(first).min(count));
            if exact {
                centroids.exact_block(x, &mut found[..count], None);
            } else {
                let (lowest, second) = (&mut lowest[..scored], &mut second[..scored]);
                if scored > 0 {
                    centroids.scores_block(x.block(0..scored), &mut found[..scored], lowest, second);
                }
                centroids.nearest_block(x.block(scored..count), &mut found[scored..count], None);
                for row in 0..scored {
                    self.bounds.tighten(first + row, x.row(row), lowest[row], second[row], centroids);
                }
            }
            for (row, found) in found[..count].iter().enumerate() {
                self.change(first + row, *found);
            }
        }
    }

    /// The same, where all rows have bounds: only open rows are compared with all centres, in dense blocks.
    fn assign_open(&mut self, centroids: &Centroids, exact: bool) {
        let mut open = std::mem::take(&mut self.open);
        open.retain(|row| {
            let (row, mut distance) = (*row as usize, [0.0]);
            centroids.distances_to(self.x.block(row..row + 1), &self.labels[row..row + 1], &mut distance);
            !self.bounds.settles(row, distance[0], centroids)
        });
        let (mut values, mut found) = (Vec::new(), [0; COMPARED]);
        let (mut lowest, mut second) = ([0.0; COMPARED], [0.0; COMPARED]);
        for open in open.chunks(COMPARED) {
            values.clear();
            open.iter().for_each(|row| values.extend_from_slice(self.x.row(*row as usize)));
            let (x, count) = (Columns::contiguous(&values, self.x.width()), open.len());
            match exact {
                true => centroids.exact_block(x, &mut found[..count], None),
                false => {
                    centroids.scores_block(x, &mut found[..count], &mut lowest[..count], &mut second[..count]);
                }
            }
            for (place, row) in open.iter().map(|row| *row as usize).enumerate() {
                match exact {
                    true => self.bounds.forget(row),
                    false => self.bounds.tighten(row, x.row(place), lowest[place], second[place], centroids),
                }
                self.change(row, found[place]);
            }
        }
        self.open = open;
    }

    #[inline]
    fn change(&mut self, row: usize, label: u32) {
        let old = std::mem::replace(&mut self.labels[row], label);
        if old != label {
            self.changes += 1;
            if old != NONE {
                self.moved.push(((self.first + row) as u32, old));
            }
        }
    }

    /// `(row, label)` of each row.
    fn pairs(&self) -> impl Iterator<Item = (u32, u32)> + Clone + '_ {
        self.labels.iter().enumerate().map(|(number, label)| ((self.first + number) as u32, *label))
    }

    /// `(row, label)` of each row that moved.
    fn joined(&self) -> impl Iterator<Item = (u32, u32)> + Clone + '_ {
        self.moved.iter().map(|(row, _)| (*row, self.labels[*row as usize - self.first]))
    }
}

/// All rows, in chunks whose borders do not depend on threads.
struct Assignment<'a> {
    rows: &'a Rows<'a>,
    chunks: Vec<Chunk<'a>>,
    size: usize,
    /// Rows that count in each cluster.
    counts: Vec<usize>,
    /// Whether bounds can cost less than they spare.
    prunable: bool,
    /// The rows of each chunk whose bounds are kept: a few tell whether it would pay for all.
    keep: usize,
}

impl<'a> Assignment<'a> {
    fn new(rows: &'a Rows<'a>, clusters: usize) -> Self {
        let (x, n) = (rows.x, rows.x.rows());
        let size = chunk_rows(clusters, x.width());
        let chunk = |first: usize| Chunk::new(x.block(first..n.min(first + size)), first);
        Assignment {
            rows,
            chunks: (0..n).step_by(size).map(chunk).collect(),
            size,
            counts: vec![0; clusters],
            prunable: clusters * x.width() >= PRUNABLE,
            keep: 0,
        }
    }

    /// Gives each row its nearest centre; how many changed. `drift`: what the centres moved since the last time.
    fn assign(&mut self, centroids: &Centroids, exact: bool, drift: &Drift, ctx: &Context) -> Result<usize> {
        if self.prunable {
            ctx.chunks(&mut self.chunks, 1, |_, chunk| {
                chunk[0].loosen(drift, centroids);
                Ok(())
            })?;
            let open: usize = self.chunks.iter().map(|chunk| chunk.open.len()).sum();
            let known: usize = self.chunks.iter().map(|chunk| chunk.bounds.len()).sum();
            self.keep = if 2 * open < known { usize::MAX } else { PROBED };
        }
        let keep = self.keep;
        ctx.chunks(&mut self.chunks, 1, |_, chunk| {
            chunk[0].assign(centroids, exact, keep);
            Ok(())
        })?;
        Ok(self.chunks.iter().map(|chunk| chunk.changes).sum())
    }

    fn pairs(&self) -> impl Iterator<Item = (u32, u32)> + Clone + '_ {
        self.chunks.iter().flat_map(Chunk::pairs)
    }

    fn joined(&self) -> impl Iterator<Item = (u32, u32)> + Clone + '_ {
        self.chunks.iter().flat_map(Chunk::joined)
    }

    fn left(&self) -> impl Iterator<Item = (u32, u32)> + Clone + '_ {
        self.chunks.iter().flat_map(|chunk| chunk.moved.iter().copied())
    }

    /// Brings the counts up to date: from the rows that moved, or from all.
    fn count(&mut self, anew: bool) {
        let mut counts = std::mem::take(&mut self.counts);
        let one = |row: u32| usize::from(self.rows.pull(row as usize) > 0.0);
        if anew {
            counts.fill(0);
            self.pairs().for_each(|(row, label)| counts[label as usize] += one(row));
        } else {
            self.joined().for_each(|(row, label)| counts[label as usize] += one(row));
            self.left().for_each(|(row, label)| counts[label as usize] -= one(row));
        }
        self.counts = counts;
    }

    /// Gives each empty cluster the row that is farthest from its centre, as scikit-learn does, but only rows that leave
    /// another row of positive weight behind. True if there was one.
    fn relocate_empty(&mut self, centroids: &Centroids, ctx: &Context) -> Result<bool> {
        let empty: Vec<usize> = (0..self.counts.len()).filter(|cluster| self.counts[*cluster] == 0).collect();
        if empty.is_empty() {
            return Ok(false);
        }
        let mut distances = vec![0.0; self.rows.x.rows()];
        ctx.chunks(&mut distances, self.size, |number, out| {
            centroids.distances_to(self.chunks[number].x, &self.chunks[number].labels, out);
            Ok(())
        })?;
        let counts = |row: &usize| distances[*row] > 0.0 && self.rows.pull(*row) > 0.0;
        let mut far: Vec<usize> = (0..distances.len()).filter(counts).collect();
        far.sort_by(|a, b| distances[*b].total_cmp(&distances[*a]).then(a.cmp(b)));
        let mut empty = empty.into_iter();
        let mut target = empty.next();
        for row in far {
            let Some(cluster) = target else { break };
            let chunk = &mut self.chunks[row / self.size];
            let label = &mut chunk.labels[row % self.size];
            if self.counts[*label as usize] > 1 {
                self.counts[*label as usize] -= 1;
                self.counts[cluster] += 1;
                *label = cluster as u32;
                chunk.bounds.forget(row % self.size);
                target = empty.next();
            }
        }
        Ok(true)
    }

    /// Brings the sums up to date: from the rows that moved, or from all.
    fn sum(&self, sums: &mut Sums, anew: bool, ctx: &Context) -> Result<()> {
        let clusters = self.counts.len();
        if anew {
            sums.clear();
            return sums.add(self.rows, &Order::new(self.pairs(), clusters, ctx)?, 1.0, ctx);
        }
        sums.add(self.rows, &Order::new(self.left(), clusters, ctx)?, -1.0, ctx)?;
        sums.add(self.rows, &Order::new(self.joined(), clusters, ctx)?, 1.0, ctx)
    }

    fn into_labels(self) -> Vec<u32> {
        self.chunks.into_iter().flat_map(|chunk| chunk.labels).collect()
    }
}

impl KMeans<'_> {
    pub(super) fn lloyd(&self, rows: &Rows, mut centers: Vec<f32>, tol: f64, ctx: &Context) -> Result<Run> {
        let (n, width) = (rows.x.rows(), rows.x.width());
        let clusters = centers.len() / width;
        let (mut assignment, mut sums) = (Assignment::new(rows, clusters), Sums::new(clusters, width));
        let uneven = rows.weights.is_some_and(uneven);
        // Updates since all rows were summed.
        let (mut since, mut exact, mut drift) = (RECOUNT, false, Drift::default());
        for n_iter in 1..=self.max_iter {
            let centroids = Centroids::new(&centers, width);
            let mut moved = 0;
            if !exact {
                moved = assignment.assign(&centroids, false, &drift, ctx)?;
                exact = moved == 0;
            }
            // Near-ties that float32 decides at random must not end the search: from here on labels are exact.
            if exact {
                moved = assignment.assign(&centroids, true, &drift, ctx)?;
                if moved == 0 && since == 0 {
                    return Ok(Run { centers, labels: Some(assignment.into_labels()), n_iter });
                }
            }
            let anew = moved == 0 || 2 * moved >= n || since >= RECOUNT || uneven;
            assignment.count(anew);
            let relocated = assignment.relocate_empty(&centroids, ctx)?;
            let anew = anew || relocated;
            assignment.sum(&mut sums, anew, ctx)?;
            since = if anew { 0 } else { since + 1 };
            let before = assignment.prunable.then(|| centers.clone());
            let shift = sums.move_centers(self, &assignment.counts, &mut centers, ctx)?;
            drift = before.map_or(drift, |before| Drift::new(&before, &centers, width));
            ctx.advance(1);
            if moved == 0 && shift == 0.0 && !relocated {
                return Ok(Run { centers, labels: Some(assignment.into_labels()), n_iter });
            }
            if shift <= tol {
                return Ok(Run { centers, labels: None, n_iter });
            }
        }
        Ok(Run { centers, labels: None, n_iter: self.max_iter })
    }
}

/// Whether a heavy row that leaves a cluster would take most digits of what stays with it.
fn uneven(weights: &[f64]) -> bool {
    let most = weights.iter().fold(0.0, |most: f64, weight| most.max(*weight));
    weights.iter().any(|weight| *weight > 0.0 && most / weight > f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    /// What is spared changes no label, on rows that bounds suit and on others, whether float32 decides or float64.
    #[test]
    fn pruning_changes_nothing() {
        let (n, width, clusters, ctx) = (6000, 64, 130, Context::new(Some(2), 0));
        for (spread, rounded) in [(10.0, false), (1.0, false), (0.0, false), (3.0, true)] {
            let mut rng = Rng::new(5);
            let means: Vec<f64> = (0..clusters * width).map(|_| spread * rng.normal()).collect();
            let mut x = Vec::new();
            for _ in 0..n {
                let mean = &means[rng.below(clusters) * width..][..width];
                let value = |mean: &f64| mean + rng.normal();
                x.extend(mean.iter().map(value).map(|v| if rounded { v.round() } else { v } as f32));
            }
            let rows = Rows { x: Columns::contiguous(&x, width), weights: None };
            let (mut pruned, mut dense) = (Assignment::new(&rows, clusters), Assignment::new(&rows, clusters));
            assert!(pruned.prunable);
            dense.prunable = false;
            let (mut centers, mut drift) = (x[..clusters * width].to_vec(), Drift::default());
            let (kmeans, mut spared) = (KMeans::new(clusters), 0);
            for step in 0..20 {
                let (centroids, exact) = (Centroids::new(&centers, width), step > 15);
                pruned.assign(&centroids, exact, &drift, &ctx).unwrap();
                dense.assign(&centroids, exact, &drift, &ctx).unwrap();
                assert!(pruned.pairs().eq(dense.pairs()), "spread {spread}, step {step}");
                assert!(pruned.left().eq(dense.left()));
                let known = |chunk: &Chunk| chunk.bounds.len().saturating_sub(chunk.open.len());
                spared = spared.max(pruned.chunks.iter().map(known).sum());
                let (before, mut sums) = (centers.clone(), Sums::new(clusters, width));
                pruned.count(true);
                pruned.sum(&mut sums, true, &ctx).unwrap();
                sums.move_centers(&kmeans, &pruned.counts, &mut centers, &ctx).unwrap();
                drift = Drift::new(&before, &centers, width);
            }
            assert!(spread < 10.0 || spared > n / 2, "{spared} of {n} rows spared");
        }
    }
}
