//! The meaning of every kernel: one plain loop each.

use super::{
    check, Bags, BooksView, Descent, Extension, Grids, Kernels, Level, LevelsView, Meaning, Output, Panels, Products,
    Rows, Scales, Sweep, TrellisView, Values, PEAK_FMAS,
};
use crate::bits;
use half::{bf16, f16};
use std::ops::Range;

pub(super) static KERNELS: Kernels = Kernels {
    name: "scalar",
    panel_rows: PANEL_ROWS,
    block_centers: BLOCK_CENTERS,
    panel_centers: PANEL_CENTERS,
    lookup_books,
    lookup_levels,
    pool_books,
    pool_levels,
    pack: pack::<PANEL_ROWS>,
    nearest,
    sift: None,
    dots,
    distances,
    extend,
    decode_trellis,
    sweep,
    hadamard,
    descend,
    quantize,
    grid_error,
    axpy,
    to_f16,
    to_bf16,
    carries,
    fma_peak,
};

const PANEL_ROWS: usize = 8;
const BLOCK_CENTERS: usize = 4;
const PANEL_CENTERS: usize = 8;

/// Continuations of a partial code are looked at in groups of this many.
pub(super) const BEAM_LANES: usize = 16;

fn value(values: Values, index: usize) -> f32 {
    match values {
        Values::F32(values) => values[index],
        Values::F16(values) => f16::from_bits(values[index]).to_f32(),
        Values::Bf16(values) => bf16::from_bits(values[index]).to_f32(),
        Values::I8(values) => f32::from(values[index]),
    }
}

fn lookup_books(view: &BooksView, rows: &Rows, out: Output) {
    check::books(view, rows, &out);
    KERNELS.write(view.dim, out, |range, out| decode_books(view, &rows.part(range), out));
}

pub(super) fn decode_books(view: &BooksView, rows: &Rows, out: &mut [f32]) {
    for (position, out) in rows.range.clone().zip(out.chunks_exact_mut(view.dim)) {
        let code = &rows.codes[rows.ids.get(position) * view.row_bytes..][..view.row_bytes];
        if !view.stores_first() {
            out.fill(0.0);
        }
        let mut m = 0;
        for group in &view.groups {
            for (book, start) in group.starts.iter().enumerate() {
                let entry = (book << view.bits) + bits::get(code, view.bits, m) as usize;
                let store = view.tiled || (m == 0 && group.width == view.dim);
                let scale = view.scale_of(m);
                for (t, out) in out[*start..][..group.width].iter_mut().enumerate() {
                    let value = value(group.entries, entry * group.width + t);
                    *out = if store { value * scale } else { value.mul_add(scale, *out) };
                }
                m += 1;
            }
        }
    }
}

fn pool_books(view: &BooksView, bags: &Bags, out: &mut [f32]) {
    check::pool_books(view, bags, out);
    pool(bags, view.dim, out, |rows, out| decode_books(view, rows, out));
}

fn pool_levels(view: &LevelsView, bags: &Bags, out: &mut [f32]) {
    check::pool_levels(view, bags, out);
    pool(bags, view.dim, out, |rows, out| decode_levels(view, rows, out));
}

/// Combines rows that `lookup` decodes, some at a time so that they stay in the first-level cache.
#[inline(always)]
pub(super) fn pool(bags: &Bags, dim: usize, out: &mut [f32], lookup: impl Fn(&Rows, &mut [f32])) {
    const PART: usize = 16;
    let mut part = vec![0.0; PART.min(bags.rows.range.len()) * dim];
    for (borders, out) in bags.borders.windows(2).zip(out.chunks_exact_mut(dim)) {
        let bag = borders[0] as usize..borders[1] as usize;
        if !bags.resume {
            out.fill(0.0);
        }
        for start in bag.clone().step_by(PART) {
            let range = start..bag.end.min(start + PART);
            let part = &mut part[..range.len() * dim];
            lookup(&Rows { range: range.clone(), stream: false, ..bags.rows }, part);
            for (position, row) in range.zip(part.chunks_exact(dim)) {
                let first = position == bag.start && !bags.resume;
                for (out, value) in out.iter_mut().zip(row) {
                    *out = match bags.weights {
                        _ if bags.max && (first || *value > *out) => *value,
                        _ if bags.max => *out,
                        Some(weights) => weights[position].mul_add(*value, *out),
                        None => *out + *value,
                    };
                }
            }
        }
    }
}

fn decode_trellis(view: &TrellisView, rows: &Rows, out: &mut [f32]) {
    check::trellis(view, rows, out);
    for (position, out) in rows.range.clone().zip(out.chunks_exact_mut(view.dim)) {
        let code = &rows.codes[rows.ids.get(position) * view.row_bytes..][..view.row_bytes];
        let bits = |from: u32, count: u32| (from..from + count).rev().fold(0, |all, bit| all << 1 | bit_at(code, bit));
        let last = view.bits - view.state_bits;
        let around = u64::from(bits(last, view.state_bits)) | u64::from(bits(0, view.state_bits)) << view.state_bits;
        let scale = view.scales[bits(view.bits, view.scale_bits) as usize];
        for (t, (out, place)) in out.iter_mut().zip(view.places).enumerate() {
            let state = match t < view.dim - view.wrapped {
                true => bits(8 * place.byte + place.shift, view.state_bits),
                false => (around >> place.shift) as u32 & ((1 << view.state_bits) - 1),
            };
            *out = view.levels[(place.table + state) as usize] * view.columns[t] * scale;
        }
    }
}

fn bit_at(code: &[u8], bit: u32) -> u32 {
    u32::from(code[bit as usize / 8] >> (bit % 8) & 1)
}

pub(super) fn sweep(task: &Sweep, costs: &mut [f32], least: &mut [f32], back: &mut [u8]) {
    check::sweep(task, costs, least, back);
    let states = 1 << task.state_bits;
    let mut back = back;
    for (number, (step, value)) in task.steps.iter().zip(task.values).enumerate() {
        let heads = states >> step.bits;
        let (here, after) = std::mem::take(&mut back).split_at_mut(if step.bits > 0 { heads } else { 0 });
        back = after;
        match (number, step.bits) {
            (0, _) => start(task.start, &mut least[..heads]),
            (_, 0) => least[..states].copy_from_slice(costs),
            _ => merge(0..heads, heads, costs, least, here),
        }
        let levels = &task.levels[step.table as usize..][..states];
        for (state, (cost, level)) in costs.iter_mut().zip(levels).enumerate() {
            let error = (-level).mul_add(step.scale, *value);
            *cost = error.mul_add(error, least[state >> step.bits]);
        }
    }
}

/// Costs before the first step: nothing where any start will do, else infinity but for the one that is given.
pub(super) fn start(given: Option<u32>, least: &mut [f32]) {
    least.fill(if given.is_some() { f32::INFINITY } else { 0.0 });
    if let Some(head) = given {
        least[head as usize] = 0.0;
    }
}

/// The cheapest state that leads to each of some heads, and the top bits that it has beside them: the first of equals.
pub(super) fn merge(some: Range<usize>, heads: usize, costs: &[f32], least: &mut [f32], back: &mut [u8]) {
    for head in some {
        let (mut best, mut which) = (costs[head], 0);
        for (choice, cost) in costs[head..].iter().step_by(heads).enumerate() {
            if *cost < best {
                (best, which) = (*cost, choice);
            }
        }
        (least[head], back[head]) = (best, which as u8);
    }
}

/// Sums and differences of each value with the one `half` places on, for half = 1, 2, 4, ... in turn; then all times
/// `factor`. Several turns are taken at a time, which gives the same bits.
#[inline(always)]
pub(super) fn hadamard(values: &mut [f32], factor: f32) {
    assert!(values.len().is_power_of_two(), "values of a Walsh-Hadamard transform");
    let mut half = 1;
    if values.len() >= 8 {
        for eight in values.as_chunks_mut::<8>().0 {
            let [a, b, c, d, e, f, g, h] = *eight;
            let [a, b, c, d, e, f, g, h] = [a + b, a - b, c + d, c - d, e + f, e - f, g + h, g - h];
            let [a, b, c, d, e, f, g, h] = [a + c, b + d, a - c, b - d, e + g, f + h, e - g, f - h];
            *eight = [a + e, b + f, c + g, d + h, a - e, b - f, c - g, d - h];
        }
        half = 8;
    }
    while 4 * half <= values.len() {
        for four in values.chunks_exact_mut(4 * half) {
            let (low, high) = four.split_at_mut(2 * half);
            let ((a, b), (c, d)) = (low.split_at_mut(half), high.split_at_mut(half));
            for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
                let (p, q, r, s) = (*a + *b, *a - *b, *c + *d, *c - *d);
                (*a, *b, *c, *d) = (p + r, q + s, p - r, q - s);
            }
        }
        half *= 4;
    }
    while half < values.len() {
        for pair in values.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    values.iter_mut().for_each(|value| *value *= factor);
}

pub(super) fn half_at(bytes: &[u8], index: usize) -> u16 {
    u16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]])
}

pub(super) fn level_at(level: Level, code: &[u8], index: usize) -> f32 {
    match level {
        Level::F16 => f16::from_bits(half_at(code, index)).to_f32(),
        Level::Bf16 => bf16::from_bits(half_at(code, index)).to_f32(),
        _ => bits::get(code, level.bits(), index) as f32,
    }
}

/// What level `index` of a row stands for, before its scale; not for levels of a row's own.
pub(super) fn entry_at(view: &LevelsView, code: &[u8], index: usize) -> f32 {
    match view.meaning {
        Meaning::Table(table) => table[bits::get(code, view.level.bits(), index) as usize],
        _ => level_at(view.level, code, index),
    }
}

/// Scale and offset of block `index`; `pairs` is what follows the levels of a row. With a table the offset is not used.
pub(super) fn pair_at(view: &LevelsView, pairs: &[u8], index: usize) -> (f32, f32) {
    let Scales::Row { symmetric, narrow, scale_factor, offset_factor, .. } = view.scales else { unreachable!() };
    let number = |at| f16::from_bits(half_at(pairs, at)).to_f32();
    if symmetric {
        let scale = if narrow { f16::from_bits(u16::from(pairs[index]) << 6).to_f32() } else { number(index) };
        let scale = scale * scale_factor;
        (scale, -scale * (1u32 << (view.level.bits() - 1)) as f32)
    } else {
        (number(2 * index) * scale_factor, number(2 * index + 1) * offset_factor)
    }
}

fn lookup_levels(view: &LevelsView, rows: &Rows, out: Output) {
    check::levels(view, rows, &out);
    KERNELS.write(view.dim, out, |range, out| decode_levels(view, &rows.part(range), out));
}

pub(super) fn decode_levels(view: &LevelsView, rows: &Rows, out: &mut [f32]) {
    let table = matches!(view.meaning, Meaning::Table(_));
    for (position, out) in rows.range.clone().zip(out.chunks_exact_mut(view.dim)) {
        let code = &rows.codes[rows.ids.get(position) * view.row_bytes..][..view.row_bytes];
        if let (Meaning::Own, Scales::Row { block, scale_factor, .. }) = (view.meaning, view.scales) {
            decode_own(view, code, block, scale_factor, out);
            continue;
        }
        for (t, out) in out.iter_mut().enumerate() {
            let entry = entry_at(view, code, t);
            *out = match view.scales {
                Scales::None => entry,
                Scales::Columns { scale, .. } if table => entry * scale[t],
                Scales::Columns { scale, offset } => entry.mul_add(scale[t], offset[t]),
                Scales::Row { block, .. } => {
                    let (scale, offset) = pair_at(view, &code[view.level_bytes()..], t / block);
                    if table {
                        entry * scale
                    } else {
                        entry.mul_add(scale, offset)
                    }
                }
            };
        }
    }
}

/// A row whose blocks have levels of their own.
#[inline(always)]
pub(super) fn decode_own(view: &LevelsView, code: &[u8], block: usize, factor: f32, out: &mut [f32]) {
    let (bits, own) = (view.level.bits(), &code[view.level_bytes()..]);
    let mut levels = [0f32; 256];
    for (index, out) in out.chunks_mut(block).enumerate() {
        for (place, level) in levels[..1 << bits].iter_mut().enumerate() {
            *level = f16::from_bits(half_at(own, (index << bits) + place)).to_f32() * factor;
        }
        for (t, out) in out.iter_mut().enumerate() {
            // The mask says to the compiler what 8 bits are.
            *out = levels[bits::get(code, bits, index * block + t) as usize & 255];
        }
    }
}

pub(super) fn pack<const PANEL: usize>(x: &[f32], stride: usize, rows: usize, shift: &[f32], out: &mut [f32]) {
    check::pack(x, stride, rows, shift, out, PANEL);
    for (panel, out) in out.chunks_exact_mut(PANEL * shift.len()).enumerate() {
        for (t, out) in out.chunks_exact_mut(PANEL).enumerate() {
            for (r, out) in out.iter_mut().enumerate() {
                let row = panel * PANEL + r;
                *out = if row < rows { x[row * stride + t] - shift[t] } else { 0.0 };
            }
        }
    }
}

fn nearest(panels: &Panels, labels: &mut [u32], best: &mut [f32], second: &mut [f32]) {
    check::nearest(panels, labels, best, second, PANEL_ROWS, BLOCK_CENTERS);
    let width = panels.width;
    for row in 0..labels.len() {
        let (mut label, mut low, mut next) = (0, f32::INFINITY, f32::INFINITY);
        let x = |t: usize| panels.rows[row / PANEL_ROWS * panels.stride + t * PANEL_ROWS + row % PANEL_ROWS];
        for (j, half_norm) in panels.half_norms.iter().enumerate() {
            let c = |t: usize| panels.centers[(j / BLOCK_CENTERS * width + t) * BLOCK_CENTERS + j % BLOCK_CENTERS];
            let score = (0..width).fold(*half_norm, |sum, t| (-x(t)).mul_add(c(t), sum));
            if score < low {
                // Of equals the first stays, also of zeros whose signs differ.
                next = if low < next { low } else { next };
                (low, label) = (score, panels.labels[j]);
            } else if score < next {
                next = score;
            }
        }
        (labels[row], best[row]) = (label, low);
        if !second.is_empty() {
            second[row] = next;
        }
    }
}

fn products(task: &Products, out: &mut [f32], step: impl Fn(f32, f32, f32) -> f32) {
    check::products(task, out, PANEL_CENTERS);
    let width = task.width;
    for row in 0..task.rows {
        let x = &task.x[row * task.stride..][..width];
        for j in 0..task.count {
            let c = |t: usize| task.centers[(j / PANEL_CENTERS * width + t) * PANEL_CENTERS + j % PANEL_CENTERS];
            out[row * task.count + j] = (0..width).fold(0.0, |sum, t| step(x[t], c(t), sum));
        }
    }
}

fn dots(task: &Products, out: &mut [f32]) {
    products(task, out, |x, c, sum| x.mul_add(c, sum));
}

fn distances(task: &Products, out: &mut [f32]) {
    products(task, out, |x, c, sum| (x - c).mul_add(x - c, sum));
}

fn extend(task: &Extension, scores: &mut [f32], paths: &mut [u16]) {
    let keep = check::extension(task, scores, paths);
    let (entries, stage) = (task.entries, task.stage);
    for row in 0..task.rows {
        let mut found: Vec<(f32, usize, u16)> = Vec::new();
        for partial in row * task.count..(row + 1) * task.count {
            let products = if task.tables.is_empty() { partial } else { row } * entries;
            let path = &task.paths[partial * stage..][..stage];
            for entry in 0..entries {
                let shared =
                    task.tables.iter().zip(path).map(|(table, old)| table[usize::from(*old) * entries + entry]);
                let start = task.half_norms[entry] - task.products[products + entry];
                found.push((shared.fold(start, |sum, v| sum + v) + task.scores[partial], partial, entry as u16));
            }
        }
        // Adding zero makes a negative zero positive: the two are equal. The sort is stable.
        found.retain(|(score, ..)| !score.is_nan());
        found.sort_by(|(a, ..), (b, ..)| (a + 0.0).total_cmp(&(b + 0.0)));
        // Numbers that are not finite can leave fewer scores to choose from: any code serves there.
        found.resize(found.len().max(keep), (f32::INFINITY, row * task.count, 0));
        for (place, (score, partial, entry)) in found[..keep].iter().enumerate() {
            let at = row * keep + place;
            scores[at] = *score;
            let path = &mut paths[at * (stage + 1)..][..stage + 1];
            path[..stage].copy_from_slice(&task.paths[partial * stage..][..stage]);
            path[stage] = *entry;
        }
    }
}

/// How the scores of a book's entries are brought up to date: what [`descend`] spends its time with.
///
/// # Safety
///
/// The functions may need an instruction set; slices are as [`Scores`] hands them over.
pub(super) trait Refresh {
    /// A number of half precision.
    unsafe fn half(bits: u16) -> f32;
    /// Starts the scores anew as half norms less products, unless `start` is empty; adds `factor` times each of the
    /// rows, in order; gives the place of the lowest score, the first of equals. Everything holds whole groups of
    /// [`BEAM_LANES`].
    unsafe fn refresh(scores: &mut [f32], start: Option<(&[f32], &[f32])>, rows: &[(f32, &[u16])]) -> usize;
    /// Asks for numbers that will be read soon.
    unsafe fn fetch(row: &[u16]);
}

/// The plain loops.
struct Plain;

impl Refresh for Plain {
    unsafe fn half(bits: u16) -> f32 {
        f16::from_bits(bits).to_f32()
    }

    unsafe fn refresh(scores: &mut [f32], start: Option<(&[f32], &[f32])>, rows: &[(f32, &[u16])]) -> usize {
        let (mut place, mut low) = (0, f32::INFINITY);
        for (k, score) in scores.iter_mut().enumerate() {
            if let Some((half_norms, products)) = start {
                *score = half_norms[k] - products[k];
            }
            for (factor, row) in rows {
                *score = f16::from_bits(row[k]).to_f32().mul_add(*factor, *score);
            }
            if *score < low {
                (place, low) = (k, *score);
            }
        }
        place
    }

    unsafe fn fetch(_: &[u16]) {}
}

fn descend(task: &Descent, codes: &mut [u16], scores: &mut [f32]) {
    // SAFETY: plain loops need no instruction set.
    unsafe { descend_by::<Plain>(task, codes, scores) }
}

/// The search, over any way to bring scores up to date.
#[inline(always)]
pub(super) unsafe fn descend_by<R: Refresh>(task: &Descent, codes: &mut [u16], scores: &mut [f32]) {
    check::descent(task, codes, scores);
    let books = task.half_norms.len();
    let mut table = Scores::new(task);
    let mut code = vec![0u16; books];
    let straight: Vec<usize> = (0..books).collect();
    for (row, (best, score)) in codes.chunks_exact_mut(books).zip(scores).enumerate() {
        table.begin(row);
        // SAFETY: the task was checked; the instruction set is the caller's.
        unsafe {
            *score = table.score::<R>(best);
            code.copy_from_slice(best);
            table.sweeps::<R>(&mut code, &straight);
            table.keep_lower::<R>(&code, best, score);
            for kick in task.kicks {
                for ((entry, best), shift) in code.iter_mut().zip(best.iter()).zip(&kick.shifts) {
                    let moved = usize::from(*best) + shift;
                    *entry = (if moved < task.entries { moved } else { moved - task.entries }) as u16;
                }
                table.sweeps::<R>(&mut code, &kick.order);
                table.keep_lower::<R>(&code, best, score);
            }
        }
    }
}

/// For each book of a row the scores of all its entries, given those of the other books that it has seen last. A visit
/// adds what has changed since, or sums anew where that is less work.
struct Scores<'a> {
    task: &'a Descent<'a>,
    row: usize,
    /// Numbers a book: whole groups of [`BEAM_LANES`].
    stride: usize,
    values: Vec<f32>,
    /// `[book][other book]`: the other's entry at the last visit.
    seen: Vec<u16>,
    /// The entry that the last visit chose; none before the first one.
    chosen: Vec<Option<u16>>,
    rows: Vec<(f32, &'a [u16])>,
}

impl<'a> Scores<'a> {
    fn new(task: &'a Descent<'a>) -> Self {
        let (books, stride) = (task.half_norms.len(), task.entries.next_multiple_of(BEAM_LANES));
        Scores {
            task,
            row: 0,
            stride,
            values: vec![0.0; books * stride],
            seen: vec![0; books * books],
            chosen: vec![None; books],
            rows: Vec::with_capacity(2 * books),
        }
    }

    /// Turns to another row.
    #[inline(always)]
    fn begin(&mut self, row: usize) {
        self.row = row;
        self.chosen.fill(None);
    }

    /// Products of an entry with those of another book.
    #[inline(always)]
    fn pairs(&self, book: usize, entry: u16, other: usize) -> &'a [u16] {
        let (books, entries) = (self.task.half_norms.len(), self.task.entries);
        &self.task.pairs[((book * books + other) * entries + usize::from(entry)) * entries..][..self.stride]
    }

    #[inline(always)]
    fn products(&self, book: usize) -> &'a [f32] {
        &self.task.products[book][self.row * self.task.entries..][..self.stride]
    }

    /// Visits all books until nothing changes, or so many times as allowed.
    #[inline(always)]
    unsafe fn sweeps<R: Refresh>(&mut self, code: &mut [u16], order: &[usize]) {
        for _ in 0..self.task.sweeps {
            let mut changed = false;
            for (index, book) in order.iter().enumerate() {
                // SAFETY: passed on to the caller.
                let entry = unsafe {
                    self.fetch::<R>(order[if index + 1 < order.len() { index + 1 } else { 0 }], *book, code);
                    self.visit::<R>(*book, code)
                };
                changed |= entry != code[*book];
                code[*book] = entry;
            }
            if !changed {
                break;
            }
        }
    }

    /// Asks for what the next visit will read, as far as it is known while another book is visited.
    #[inline(always)]
    unsafe fn fetch<R: Refresh>(&self, next: usize, visited: usize, code: &[u16]) {
        let seen = &self.seen[next * code.len()..][..code.len()];
        for (other, entry) in code.iter().enumerate() {
            let changed = self.chosen[next].is_none() || seen[other] != *entry;
            if changed && other != next && other != visited {
                // SAFETY: passed on to the caller.
                unsafe { R::fetch(self.pairs(other, *entry, next)) };
            }
        }
    }

    /// The best entry of a book, given the others.
    #[inline(always)]
    unsafe fn visit<R: Refresh>(&mut self, book: usize, code: &[u16]) -> u16 {
        let (books, scale) = (code.len(), self.task.scale);
        let mut changes = 0;
        for other in 0..books {
            changes += usize::from(self.seen[book * books + other] != code[other] && other != book);
        }
        let mut start = None;
        self.rows.clear();
        match self.chosen[book] {
            Some(entry) if changes == 0 => return entry,
            Some(_) if 2 * changes < books - 1 => {
                for other in 0..books {
                    let seen = self.seen[book * books + other];
                    if seen != code[other] && other != book {
                        self.rows.push((-scale, self.pairs(other, seen, book)));
                        self.rows.push((scale, self.pairs(other, code[other], book)));
                    }
                }
            }
            _ => {
                start = Some((&self.task.half_norms[book][..self.stride], self.products(book)));
                for other in 0..books {
                    if other != book {
                        self.rows.push((scale, self.pairs(other, code[other], book)));
                    }
                }
            }
        }
        self.seen[book * books..][..books].copy_from_slice(code);
        let values = &mut self.values[book * self.stride..][..self.stride];
        // SAFETY: all slices have `stride` numbers; the instruction set is the caller's.
        let entry = unsafe { R::refresh(values, start, &self.rows) } as u16;
        self.chosen[book] = Some(entry);
        entry
    }

    /// Half the squared error of a code, less half the row's squared norm.
    #[inline(always)]
    unsafe fn score<R: Refresh>(&self, code: &[u16]) -> f32 {
        let mut sum = 0f32;
        for (book, entry) in code.iter().enumerate() {
            let at = usize::from(*entry);
            sum += self.task.half_norms[book][at] - self.products(book)[at];
            for (other, entry) in code[..book].iter().enumerate() {
                // SAFETY: the instruction set is the caller's.
                let product = unsafe { R::half(self.pairs(other, *entry, book)[at]) };
                sum = product.mul_add(self.task.scale, sum);
            }
        }
        sum
    }

    /// Takes a code where its score is lower than the best one's.
    #[inline(always)]
    unsafe fn keep_lower<R: Refresh>(&self, code: &[u16], best: &mut [u16], low: &mut f32) {
        // SAFETY: passed on to the caller.
        let score = unsafe { self.score::<R>(code) };
        if score < *low {
            *low = score;
            best.copy_from_slice(code);
        }
    }
}

#[inline(always)]
pub(super) fn quantize(values: &[f32], grids: &Grids, levels: &mut [u8]) {
    check::quantize(values, grids, levels);
    let top = grids.top;
    for (((level, value), step), low) in levels.iter_mut().zip(values).zip(grids.steps).zip(grids.lows) {
        // A division, because the inverse of a denormal step overflows.
        let place = if *step == 0.0 { 0.0 } else { (value - low) / step + 0.5 };
        *level = whole(place, top) as u8;
    }
}

/// The integer part of a place on a grid, from 0 to `top`.
#[inline(always)]
fn whole(place: f32, top: f32) -> i32 {
    let low = if place > 0.0 { place } else { 0.0 };
    let place = if low < top + 0.5 { low } else { top + 0.5 };
    // SAFETY: from 0 to 255.5.
    unsafe { place.to_int_unchecked::<i32>() }
}

#[inline(always)]
pub(super) fn grid_error(values: &[f32], step: f32, low: f32, top: f32) -> f32 {
    check::top(top);
    // Multiplying by the inverse is faster; a search needs no exact ties.
    let inverse = if step == 0.0 { 0.0 } else { 1.0 / step };
    let mut lanes = [0f32; 16];
    let add = |lane: &mut f32, value: &f32| {
        let level = whole((value - low) * inverse + 0.5, top) as f32;
        let difference = value - (level * step + low);
        *lane += difference * difference;
    };
    let chunks = values.chunks_exact(16);
    chunks.remainder().iter().zip(&mut lanes).for_each(|(v, lane)| add(lane, v));
    chunks.for_each(|chunk| lanes.iter_mut().zip(chunk).for_each(|(lane, v)| add(lane, v)));
    lanes.iter().sum()
}

fn axpy(out: &mut [f32], x: &[f32], weight: f32) {
    check::pair(out, x);
    for (out, x) in out.iter_mut().zip(x) {
        *out = weight.mul_add(*x, *out);
    }
}

pub(super) fn to_f16(x: &[f32], out: &mut [u16]) {
    check::pair(out, x);
    for (out, x) in out.iter_mut().zip(x) {
        *out = f16::from_f32(*x).to_bits();
    }
}

pub(super) fn to_bf16(x: &[f32], out: &mut [u16]) {
    check::pair(out, x);
    for (out, x) in out.iter_mut().zip(x) {
        *out = bf16::from_f32(*x).to_bits();
    }
}

#[inline(always)]
pub(super) fn carries(words: &[u32], mask: u32, one: u32) -> u32 {
    words.iter().fold(0, |all, word| all | (word & mask).wrapping_add(one))
}

fn fma_peak(rounds: usize) -> f32 {
    let (factor, summand) = std::hint::black_box((0.5, 0.5));
    (0..rounds * PEAK_FMAS).fold(0.0, |sum: f32, _| sum.mul_add(factor, summand))
}
