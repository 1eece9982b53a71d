//! Lloyd's iterations: rows go to their nearest centres, centres to the means of their rows.
//!
//! After the first iterations few rows change their cluster, so that sums are kept and only these rows are added and
//! taken away. All rows are summed anew where that is less work, after relocations, every [`RECOUNT`] iterations and at
//! the end, so that rounding does not add up.

use super::sums::{Order, Sums};
use super::{chunk_rows, KMeans, Rows, Run};
use crate::algo::nearest::{Centroids, Columns};
use crate::error::Result;
use crate::pool::Context;

/// Iterations after which all rows are summed anew.
const RECOUNT: usize = 16;

/// Rows whose labels are compared while they are in the first-level cache.
const COMPARED: usize = 1024;

/// The label of rows that have none yet.
const NONE: u32 = u32::MAX;

/// Rows that one task looks after, with all that is known of them.
struct Chunk<'a> {
    x: Columns<'a>,
    first: usize,
    labels: Vec<u32>,
    /// Row and former label of those that changed it, but not of those that had none.
    moved: Vec<(u32, u32)>,
    changes: usize,
}

impl<'a> Chunk<'a> {
    fn new(x: Columns<'a>, first: usize) -> Self {
        Chunk { x, first, labels: vec![NONE; x.rows()], moved: Vec::new(), changes: 0 }
    }

    /// Gives each row its nearest centre.
    fn assign(&mut self, centroids: &Centroids, exact: bool) {
        self.changes = 0;
        self.moved.clear();
        let mut buffer = [0; COMPARED];
        for (block, labels) in self.labels.chunks_mut(COMPARED).enumerate() {
            let first = block * COMPARED;
            let (x, found) = (self.x.block(first..first + labels.len()), &mut buffer[..labels.len()]);
            match exact {
                true => centroids.exact_block(x, found, None),
                false => centroids.nearest_block(x, found, None),
            }
            let first = self.first + first;
            for (number, (label, found)) in labels.iter_mut().zip(found).enumerate() {
                if *label != *found {
                    self.changes += 1;
                    if *label != NONE {
                        self.moved.push(((first + number) as u32, *label));
                    }
                    *label = *found;
                }
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
}

impl<'a> Assignment<'a> {
    fn new(rows: &'a Rows<'a>, clusters: usize) -> Self {
        let (x, n) = (rows.x, rows.x.rows());
        let size = chunk_rows(clusters, x.width());
        let chunk = |first: usize| Chunk::new(x.block(first..n.min(first + size)), first);
        Assignment { rows, chunks: (0..n).step_by(size).map(chunk).collect(), size, counts: vec![0; clusters] }
    }

    /// Gives each row its nearest centre; how many changed.
    fn assign(&mut self, centroids: &Centroids, exact: bool, ctx: &Context) -> Result<usize> {
        ctx.chunks(&mut self.chunks, 1, |_, chunk| {
            chunk[0].assign(centroids, exact);
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
            let label = &mut self.chunks[row / self.size].labels[row % self.size];
            if self.counts[*label as usize] > 1 {
                self.counts[*label as usize] -= 1;
                self.counts[cluster] += 1;
                *label = cluster as u32;
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
        // Updates since all rows were summed.
        let (mut since, mut exact) = (RECOUNT, false);
        for n_iter in 1..=self.max_iter {
            let centroids = Centroids::new(&centers, width);
            let mut moved = 0;
            if !exact {
                moved = assignment.assign(&centroids, false, ctx)?;
                exact = moved == 0;
            }
            // Near-ties that float32 decides at random must not end the search: from here on labels are exact.
            if exact {
                moved = assignment.assign(&centroids, true, ctx)?;
                if moved == 0 && since == 0 {
                    return Ok(Run { centers, labels: Some(assignment.into_labels()), n_iter });
                }
            }
            let anew = moved == 0 || 2 * moved >= n || since >= RECOUNT;
            assignment.count(anew);
            let relocated = assignment.relocate_empty(&centroids, ctx)?;
            let anew = anew || relocated;
            assignment.sum(&mut sums, anew, ctx)?;
            since = if anew { 0 } else { since + 1 };
            let shift = sums.move_centers(self, &assignment.counts, &mut centers, ctx)?;
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
