//! Exact search by scanning the codes.
//!
//! Where the decoder's form allows it, a query becomes tables and a row costs one addition a field. Otherwise blocks of
//! rows are decoded once for all queries and compared directly.

use crate::decoder::{Metric, Scorer};
use crate::error::{product, reserved, room, Error, Result};
use crate::kernels::Ids;
use crate::matrix::Matrix;
use crate::pool::Context;
use crate::table::Table;
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Rows that one task scans for all queries.
const CHUNK_ROWS: usize = 16_384;

/// Rows that are decoded at a time.
const BLOCK_ROWS: usize = 128;

/// A row's score; the order is from the best to the worst, equal scores by row.
#[derive(Clone, Copy, Debug)]
struct Hit {
    /// Smaller is better.
    cost: f32,
    row: usize,
}

impl PartialEq for Hit {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Hit {}
impl PartialOrd for Hit {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Hit {
    fn cmp(&self, other: &Self) -> Ordering {
        self.cost.total_cmp(&other.cost).then(self.row.cmp(&other.row))
    }
}

/// The best `k` hits seen.
struct Best {
    k: usize,
    heap: BinaryHeap<Hit>,
}

impl Best {
    fn new(k: usize) -> Self {
        // Room for what most searches ask for; a large k grows as hits come in.
        Best { k, heap: BinaryHeap::with_capacity(k.min(64) + 1) }
    }

    #[inline]
    fn offer(&mut self, hit: Hit) {
        if self.heap.len() < self.k {
            self.heap.push(hit);
        } else if self.heap.peek().is_some_and(|worst| hit < *worst) {
            self.heap.pop();
            self.heap.push(hit);
        }
    }
}

/// The best `min(k, rows)` rows of each query, best first, ties by lower row: scores (squared distances for
/// [`Metric::L2`]) and rows, query after query.
pub fn search(table: &Table, queries: Matrix, k: usize, metric: Metric, ctx: &Context) -> Result<(Vec<f32>, Vec<i64>)> {
    if queries.dim() != table.dim() {
        let found = format!("{} features", queries.dim());
        return Err(Error::shape("queries", found, format!("{}, as the table", table.dim())));
    }
    if k == 0 {
        return Err(Error::parameter("k", k, "must be at least 1"));
    }
    queries.check_all(ctx).map_err(|error| error.about("queries"))?;
    let k = k.min(table.rows());
    // The best rows of each part of the table, for each query, and of all parts together.
    let parts = table.rows().div_ceil(CHUNK_ROWS);
    table.watch();
    let one = match queries.rows() {
        0 => 0,
        _ => table.decoder().scorer(queries.row(0), metric).map_or(0, |scorer| 4 * scorer.tables.len()),
    };
    let scorers = product(&[queries.rows(), one + 64]);
    let kept = product(&[queries.rows(), parts, 16 * (k.min(CHUNK_ROWS) + 1).next_power_of_two() + 64]);
    let together = product(&[queries.rows() + 2, k, 16]);
    let scratch = product(&[ctx.threads(), BLOCK_ROWS, table.dim(), 4]);
    room("a search", &[scorers, kept, together, scratch])?;
    let scorers = ctx.map(queries.rows(), |query| Ok(table.decoder().scorer(queries.row(query), metric)))?;
    ctx.stage("search", table.rows() as u64);
    let parts = ctx.map(table.rows().div_ceil(CHUNK_ROWS), |index| {
        let start = index * CHUNK_ROWS;
        let rows = start..table.rows().min(start + CHUNK_ROWS);
        table.watch();
        table.touch(rows.clone())?;
        let mut best: Vec<Best> = (0..queries.rows()).map(|_| Best::new(k)).collect();
        for (query, scorer) in scorers.iter().enumerate() {
            ctx.check()?;
            if let Some(scorer) = scorer {
                scan_tables(table, scorer, metric, rows.clone(), &mut best[query]);
            }
        }
        if scorers.iter().any(Option::is_none) {
            scan_decoded(table, queries, metric, rows.clone(), &mut best, ctx)?;
        }
        ctx.advance(rows.len() as u64);
        Ok(best)
    })?;
    table.intact()?;
    let mut scores = reserved("the scores", queries.rows().checked_mul(k))?;
    let mut ids = reserved("the ids", queries.rows().checked_mul(k))?;
    for query in 0..queries.rows() {
        let mut all = Best::new(k);
        for part in &parts {
            ctx.check()?;
            part[query].heap.iter().for_each(|hit| all.offer(*hit));
        }
        for hit in all.heap.into_sorted_vec() {
            scores.push(if metric == Metric::L2 { hit.cost } else { -hit.cost });
            ids.push(hit.row as i64);
        }
    }
    Ok((scores, ids))
}

fn scan_tables(table: &Table, scorer: &Scorer, metric: Metric, rows: std::ops::Range<usize>, best: &mut Best) {
    let bytes = table.row_bytes();
    let codes = &table.codes()[rows.start * bytes..rows.end * bytes];
    for (row, code) in rows.zip(codes.chunks_exact(bytes)) {
        let score = scorer.score(code);
        best.offer(Hit { cost: if metric == Metric::L2 { score } else { -score }, row });
    }
}

fn scan_decoded(
    table: &Table,
    queries: Matrix,
    metric: Metric,
    rows: std::ops::Range<usize>,
    best: &mut [Best],
    ctx: &Context,
) -> Result<()> {
    let mut decoded = vec![0f32; BLOCK_ROWS * table.dim()];
    let norms: Vec<f64> = (0..queries.rows()).map(|query| norm(queries.row(query))).collect();
    for start in rows.clone().step_by(BLOCK_ROWS) {
        ctx.check()?;
        let len = BLOCK_ROWS.min(rows.end - start);
        let decoded = &mut decoded[..len * table.dim()];
        table.decoder().decode(table.codes(), Ids::Range { start, len }, &mut *decoded);
        for (index, row) in decoded.chunks(table.dim()).enumerate() {
            let length = if metric == Metric::Cosine { norm(row) } else { 0.0 };
            for (query, best) in best.iter_mut().enumerate() {
                let cost = match metric {
                    Metric::InnerProduct => -dot(queries.row(query), row),
                    Metric::L2 => squared_distance(queries.row(query), row),
                    // The cosine with a zero vector is 0.
                    Metric::Cosine => {
                        -(wide_dot(queries.row(query), row) / (norms[query] * length).max(f64::MIN_POSITIVE)) as f32
                    }
                };
                best.offer(Hit { cost, row: start + index });
            }
        }
    }
    Ok(())
}

/// Sums in 16 lanes, so that the loop runs in vectors.
fn lanes(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [0f32; 16];
    let (whole_a, whole_b) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest = whole_a.remainder().iter().zip(whole_b.remainder());
    rest.zip(&mut sums).for_each(|((a, b), sum)| *sum += term(*a, *b));
    for (a, b) in whole_a.zip(whole_b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += term(*a, *b));
    }
    sums.iter().sum()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    lanes(a, b, |a, b| a * b)
}

/// In float64, where products of very small or large values keep their digits.
fn wide_dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn norm(a: &[f32]) -> f64 {
    wide_dot(a, a).sqrt()
}

fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
    lanes(a, b, |a, b| (a - b) * (a - b))
}
