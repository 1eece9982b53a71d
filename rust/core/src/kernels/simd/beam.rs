//! One stage of a beam search: scores of all continuations of some partial codes, and the best of them.
//!
//! Scores are written once, with the lowest one of each lane kept beside. The n-th lowest of the lanes is a bound that
//! at least n scores reach and few others do: a second pass packs these together without a branch a score, and ranks
//! settle their order. Several rows take each step together, because each step ends in a chain of dependent operations.

use super::{check, scalar, Extension, Simd};

/// Vectors that pack the places of small numbers.
pub(in crate::kernels) trait Pack: Simd {
    /// Writes `first` + lane, in order, for the lanes that are at most `limit`, and says for how many. May write
    /// anything after these, up to `LANES` numbers in all.
    unsafe fn places(self, limit: Self, first: u32, to: *mut u32) -> usize;
    /// Asks for a cache line. Any address is fine.
    fn fetch(address: *const f32);
}

/// Lanes whose lowest scores are kept, for every so many partial codes that are wanted.
const LANES: usize = scalar::BEAM_LANES;
const WANTED: usize = LANES / 2;

/// Rows that take each step together.
const ROWS: usize = 2;

/// Up to here ranks are counted by comparing each number with each; longer lists are sorted.
const COUNTED: usize = 64;

/// `NV` vectors of scores at a time; `NL` vectors are `LANES` numbers.
#[inline(always)]
pub(in crate::kernels) unsafe fn extend<S: Pack, const NV: usize, const NL: usize>(
    task: &Extension,
    scores: &mut [f32],
    paths: &mut [u16],
) {
    let keep = check::extension(task, scores, paths);
    let lanes = LANES * task.count.min(keep.div_ceil(WANTED));
    let mut group: Vec<Candidates> = (0..ROWS).map(|_| Candidates::new(task, lanes)).collect();
    for first in (0..task.rows).step_by(ROWS) {
        let group = &mut group[..ROWS.min(task.rows - first)];
        // SAFETY: the task was checked; the instruction set is the caller's.
        unsafe {
            for (row, candidates) in group.iter_mut().enumerate() {
                candidates.expand::<S, NV, NL>(task, first + row);
            }
            // The next rows' tables arrive while the best of these are chosen.
            for row in first + ROWS..task.rows.min(first + 2 * ROWS) {
                fetch_tables::<S>(task, row);
            }
            for candidates in group.iter_mut() {
                candidates.limit = low_bound::<S>(&mut candidates.lowest, keep);
            }
            for candidates in group.iter_mut() {
                candidates.pack::<S>();
            }
            for candidates in group.iter_mut() {
                candidates.rank::<S>();
            }
        }
        for (row, candidates) in group.iter().enumerate() {
            let row = first + row;
            let scores = &mut scores[row * keep..][..keep];
            let paths = &mut paths[row * keep * (task.stage + 1)..][..keep * (task.stage + 1)];
            candidates.write(task, row, scores, paths);
        }
    }
}

/// Asks for what the row's partial codes have in common with the stage's entries.
#[inline(always)]
fn fetch_tables<S: Pack>(task: &Extension, row: usize) {
    let paths = &task.paths[row * task.count * task.stage..][..task.count * task.stage];
    for (index, entry) in paths.iter().enumerate().take(if task.tables.is_empty() { 0 } else { paths.len() }) {
        // Most partial codes start like the one before.
        if index >= task.stage && paths[index - task.stage] == *entry {
            continue;
        }
        let table = task.tables[index % task.stage].as_ptr().wrapping_add(usize::from(*entry) * task.entries);
        for line in (0..task.entries).step_by(16) {
            S::fetch(table.wrapping_add(line));
        }
    }
}

/// The continuations of one row's partial codes.
struct Candidates<'a> {
    /// Scores: `stride` for each partial code, the last ones of each NaN where entries do not fill whole lanes.
    scores: Vec<f32>,
    /// The lowest scores of the lanes.
    lowest: Vec<f32>,
    limit: f32,
    /// Places of the scores that reach the limit, and the scores.
    found: Vec<u32>,
    count: usize,
    values: Vec<f32>,
    /// Which of those found are the first, second, ...
    order: Vec<u32>,
    /// What the entries of a partial code share with those of this stage.
    tables: Vec<&'a [f32]>,
}

impl<'a> Candidates<'a> {
    fn new(task: &Extension<'a>, lanes: usize) -> Self {
        let size = task.count * task.entries.next_multiple_of(LANES);
        Candidates {
            scores: vec![0.0; size],
            lowest: vec![0.0; lanes],
            limit: 0.0,
            found: vec![0; size + LANES],
            count: 0,
            values: vec![0.0; COUNTED],
            order: vec![0; COUNTED],
            tables: Vec::with_capacity(task.stage),
        }
    }

    /// Writes all scores of a row, and the lowest ones of the lanes.
    #[inline(always)]
    unsafe fn expand<S: Simd, const NV: usize, const NL: usize>(&mut self, task: &Extension<'a>, row: usize) {
        let stride = task.entries.next_multiple_of(LANES);
        self.lowest.fill(f32::INFINITY);
        for partial in 0..task.count {
            let at = row * task.count + partial;
            let products = if task.tables.is_empty() { at } else { row };
            let products = task.products[products * task.entries..][..stride].as_ptr();
            self.tables.clear();
            let path = &task.paths[at * task.stage..][..task.stage];
            let tables = task.tables.iter().zip(path);
            self.tables.extend(tables.map(|(table, entry)| &table[usize::from(*entry) * task.entries..][..stride]));
            let out = self.scores[partial * stride..][..stride].as_mut_ptr();
            let lowest = partial * LANES % self.lowest.len();
            let lowest = self.lowest[lowest..lowest + LANES].as_mut_ptr();
            // SAFETY: all pointers are followed by `stride` numbers, a multiple of `LANES`, and `lowest` by `LANES`.
            unsafe {
                let sums = Sums { half_norms: task.half_norms.as_ptr(), products, tables: &self.tables, out };
                let score = S::splat(task.scores[at]);
                let mut low = [score; NL];
                for v in 0..NL {
                    low[v] = S::load(lowest.add(v * S::LANES));
                }
                let mut from = 0;
                while from + NV * S::LANES <= stride {
                    sums.write::<S, NV, NL>(score, from, &mut low);
                    from += NV * S::LANES;
                }
                while from < stride {
                    sums.write::<S, NL, NL>(score, from, &mut low);
                    from += LANES;
                }
                for v in 0..NL {
                    low[v].store(lowest.add(v * S::LANES));
                }
            }
        }
    }

    /// Finds the places of all scores up to the limit.
    #[inline(always)]
    unsafe fn pack<S: Pack>(&mut self) {
        self.count = 0;
        // SAFETY: `found` has room for a vector more than there are scores.
        unsafe {
            let limit = S::splat(self.limit);
            for first in (0..self.scores.len()).step_by(S::LANES) {
                let scores = S::load(self.scores.as_ptr().add(first));
                self.count += scores.places(limit, first as u32, self.found.as_mut_ptr().add(self.count));
            }
        }
    }

    /// Puts what was found in order: by score, then by place.
    #[inline(always)]
    unsafe fn rank<S: Simd>(&mut self) {
        let found = &self.found[..self.count];
        if found.len() > COUNTED {
            self.order.clear();
            self.order.extend(0..found.len() as u32);
            self.values.clear();
            self.values.extend(found.iter().map(|place| self.scores[*place as usize]));
            // Adding zero makes a negative zero positive: the two are equal.
            let value = |index: &u32| self.values[*index as usize] + 0.0;
            self.order.sort_unstable_by(|a, b| value(a).total_cmp(&value(b)).then(a.cmp(b)));
            return;
        }
        self.order.resize(COUNTED, 0);
        self.values.resize(COUNTED, 0.0);
        for (value, place) in self.values.iter_mut().zip(found) {
            *value = self.scores[*place as usize];
        }
        let mut ranks = [0f32; COUNTED];
        // SAFETY: a multiple of vectors fits `COUNTED` numbers.
        unsafe { count_lower::<S>(&self.values, found.len(), &mut ranks) };
        // Equal numbers have equal ranks: the first one takes it, the others those that follow.
        let mut taken = 0u64;
        for index in 0..found.len() {
            let mut rank = ranks[index] as usize;
            while taken >> rank & 1 == 1 {
                rank += 1;
            }
            taken |= 1 << rank;
            self.order[rank] = index as u32;
        }
    }

    /// Writes the best continuations, best first.
    #[inline(always)]
    fn write(&self, task: &Extension, row: usize, scores: &mut [f32], paths: &mut [u16]) {
        let (stage, stride) = (task.stage, task.entries.next_multiple_of(LANES) as u32);
        for (index, (score, path)) in scores.iter_mut().zip(paths.chunks_exact_mut(stage + 1)).enumerate() {
            // Numbers that are not finite can leave fewer scores to choose from: any code serves there.
            let (value, place) = match index < self.count {
                true => (self.values[self.order[index] as usize], self.found[self.order[index] as usize]),
                false => (f32::INFINITY, 0),
            };
            let (partial, entry) = (place / stride, place % stride);
            let from = (row * task.count + partial as usize) * stage;
            for (path, old) in path.iter_mut().zip(&task.paths[from..from + stage]) {
                *path = *old;
            }
            path[stage] = entry as u16;
            *score = value;
        }
    }
}

/// What the scores of a partial code's continuations are the sums of, and where they go.
struct Sums<'a> {
    half_norms: *const f32,
    products: *const f32,
    tables: &'a [&'a [f32]],
    out: *mut f32,
}

impl Sums<'_> {
    /// Scores of `NV` vectors of entries from `from`.
    #[inline(always)]
    unsafe fn write<S: Simd, const NV: usize, const NL: usize>(&self, score: S, from: usize, low: &mut [S; NL]) {
        // SAFETY: the pointers and tables have numbers up to there.
        unsafe {
            let mut sums = [score; NV];
            for v in 0..NV {
                let at = from + v * S::LANES;
                sums[v] = S::load(self.half_norms.add(at)).sub(S::load(self.products.add(at)));
            }
            for table in self.tables {
                for v in 0..NV {
                    sums[v] = sums[v].add(S::load(table.as_ptr().add(from + v * S::LANES)));
                }
            }
            for v in 0..NV {
                let sum = sums[v].add(score);
                sum.store(self.out.add(from + v * S::LANES));
                low[v % NL] = sum.min(low[v % NL]);
            }
        }
    }
}

/// The `keep`-th lowest of some numbers, or infinity where there are fewer. They are a multiple of `LANES`.
#[inline(always)]
unsafe fn low_bound<S: Simd>(lowest: &mut [f32], keep: usize) -> f32 {
    if keep > lowest.len() {
        return f32::INFINITY;
    }
    if lowest.len() > COUNTED {
        return *lowest.select_nth_unstable_by(keep - 1, f32::total_cmp).1;
    }
    let mut ranks = [0f32; COUNTED];
    let mut highest = [f32::NEG_INFINITY; LANES];
    // SAFETY: everything holds a multiple of `LANES` numbers, and `LANES` is a multiple of vectors.
    unsafe {
        count_lower::<S>(lowest, lowest.len(), &mut ranks);
        // The highest of those with fewer than `keep` numbers below.
        let (keep, none) = (S::splat(keep as f32), S::splat(f32::NEG_INFINITY));
        for at in (0..lowest.len()).step_by(S::LANES) {
            let highest = highest.as_mut_ptr().add(at % LANES);
            let value = S::load(ranks.as_ptr().add(at)).less(keep, S::load(lowest.as_ptr().add(at)), none);
            value.max(S::load(highest)).store(highest);
        }
    }
    let mut half = LANES / 2;
    while half > 0 {
        for at in 0..half {
            highest[at] = if highest[at + half] > highest[at] { highest[at + half] } else { highest[at] };
        }
        half /= 2;
    }
    highest[0]
}

/// For each of the first `count` numbers, how many of these are lower. Both slices hold a multiple of vectors.
#[inline(always)]
unsafe fn count_lower<S: Simd>(values: &[f32], count: usize, ranks: &mut [f32]) {
    for at in (0..count).step_by(S::LANES) {
        // SAFETY: the caller's slices have whole vectors.
        unsafe {
            let (own, one, zero) = (S::load(values.as_ptr().add(at)), S::splat(1.0), S::splat(0.0));
            let mut lower = zero;
            for other in &values[..count] {
                lower = lower.add(S::splat(*other).less(own, one, zero));
            }
            lower.store(ranks.as_mut_ptr().add(at));
        }
    }
}
