//! Trellis coding of rows: a row is a circular stream of bits, and each column reads a window of it that overlaps those
//! of its neighbours (bitshift trellis: Tseng, Sun, Hou and De Sa, QTIP, 2024; tail-biting, so that no start is stored).
//!
//! Unlike the paper, levels are not in a random order but in one that spreads both the states that a state leads to and
//! those that lead to it ([`levels`]), which at equal states takes away a twentieth of the error; and a column may add any
//! number of bits, none too, so that a row can spend its bits where they tell.

use crate::kernels::{self, Place, Step, Sweep, SWEEP_PADDING};
use crate::rng::mix;
use std::sync::{Arc, OnceLock};

/// Most bits of a window.
pub const MOST_STATE_BITS: u32 = 16;

/// Most bits that a column adds.
pub const MOST_BITS: u8 = 8;

/// Columns that read the same window have tables of their own, up to this many.
const TABLES: usize = 8;

/// Streams of fewer windows than this are short: so much of them stands at the seam that rounds alone often miss the best.
const SHORT: u32 = 10;

/// States of all columns that the search of a short row may look at: as many as that of a row of 128 columns and 12 bits.
const MOST_WORK: usize = ROUNDS * (128 << 12);

/// Searches around the circle: the first finds where to start, each other one is no worse than the one before.
const ROUNDS: usize = 3;

/// The levels of a table, by state: the quantiles of a normal distribution in an order that is fixed for ever.
///
/// The highest bit of a level's rank is the state's lowest bit plus its highest, flipped by a hash of those between; the
/// next one the second lowest plus the second highest, and so on to the middle, where hashes of the higher bits take over.
/// So the 2^k states that follow one have levels in 2^k different parts of the distribution, whatever k, and so have the
/// 2^k states before one.
pub fn levels(state_bits: u32, table: usize) -> Vec<f32> {
    let states = 1u64 << state_bits;
    let rank = |state: u64| {
        let mut rank = 0;
        for i in 0..state_bits {
            let (first, mirror) = (i + 1, state_bits - 1 - i);
            let (upper, more) = match i < state_bits / 2 {
                true => (state >> first & ((1 << (mirror - first)) - 1), state >> mirror),
                false => (state >> first, 0),
            };
            let key = (table as u64) << 40 | u64::from(state_bits) << 32 | u64::from(i) << 24 | upper;
            rank |= ((state >> i ^ more ^ mix(mix(key))) & 1) << mirror;
        }
        rank
    };
    let half: Vec<f32> = (0..states / 2).map(|rank| quantile((rank as f64 + 0.5) / states as f64) as f32).collect();
    let level = |rank: u64| match rank < states / 2 {
        true => half[rank as usize],
        false => -half[(states - 1 - rank) as usize],
    };
    (0..states).map(|state| level(rank(state))).collect()
}

/// The normal quantile of `p` up to one half (Acklam's rational functions). Nothing but sums, products, quotients and
/// square roots, so that every machine finds the same bits.
fn quantile(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969683028665376e1,
        2.209460984245205e2,
        -2.759285104469687e2,
        1.38357751867269e2,
        -3.066479806614716e1,
        2.506628277459239,
    ];
    const B: [f64; 6] = [
        -5.447609879822406e1,
        1.615858368580409e2,
        -1.556989798598866e2,
        6.680131188771972e1,
        -1.328068155288572e1,
        1.0,
    ];
    const C: [f64; 6] = [
        -7.784894002430293e-3,
        -3.223964580411365e-1,
        -2.400758277161838,
        -2.549732539343734,
        4.374664141464968,
        2.938163982698783,
    ];
    const D: [f64; 5] = [7.784695709041462e-3, 3.224671290700398e-1, 2.445134137142996, 3.754408661907416, 1.0];
    let horner = |factors: &[f64], x: f64| factors.iter().fold(0.0, |sum, factor| sum * x + factor);
    if p < 0.02425 {
        let q = (-2.0 * logarithm(p)).sqrt();
        return horner(&C, q) / horner(&D, q);
    }
    let q = p - 0.5;
    horner(&A, q * q) * q / horner(&B, q * q)
}

/// The natural logarithm of a normal number: 2 artanh((m - 1) / (m + 1)) of the mantissa m.
fn logarithm(x: f64) -> f64 {
    let exponent = (x.to_bits() >> 52) as i64 - 1022;
    let mantissa = f64::from_bits(x.to_bits() & ((1 << 52) - 1) | 1022 << 52);
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let series = (0..12).rev().fold(0.0, |sum, i| sum * (s * s) + 1.0 / f64::from(2 * i + 1));
    exponent as f64 * std::f64::consts::LN_2 + 2.0 * s * series
}

/// As many bits for each column as for the others, of `bits` in all: their sums from the first column on are rounded.
pub fn even_bits(dim: usize, bits: u64) -> Vec<u8> {
    let sum = |columns: usize| (2 * columns as u64 * bits + dim as u64) / (2 * dim as u64);
    (0..dim).map(|t| (sum(t + 1) - sum(t)).min(u64::from(MOST_BITS)) as u8).collect()
}

/// Where the columns of a row read.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Bits of a window.
    pub state_bits: u32,
    /// Bits of the stream.
    pub bits: u32,
    /// Bits that each column adds.
    pub column_bits: Vec<u8>,
    /// Where each column's window starts, and its table.
    pub places: Vec<Place>,
    /// So many columns at the end have windows that wrap.
    pub wrapped: usize,
    /// Tables that the columns use.
    pub tables: usize,
}

impl Layout {
    /// The layout of columns that add so many bits each, in a window of `state_bits` bits: as many as any column adds,
    /// and no more than all of them.
    pub fn new(column_bits: &[u8], state_bits: u32) -> Self {
        let bits: u32 = column_bits.iter().map(|bits| u32::from(*bits)).sum();
        let tables = tables(column_bits);
        let mut places = Vec::with_capacity(column_bits.len());
        let (mut at, mut wrapped) = (0, 0);
        for (added, table) in column_bits.iter().zip(&tables) {
            let wraps = at + state_bits > bits;
            wrapped += usize::from(wraps);
            let table = (*table as u32) << state_bits;
            places.push(match wraps {
                true => Place { byte: 0, shift: at + state_bits - bits, table },
                false => Place { byte: at / 8, shift: at % 8, table },
            });
            at += u32::from(*added);
        }
        let tables = tables.into_iter().max().map_or(0, |last| last + 1);
        Layout { state_bits, bits, column_bits: column_bits.to_vec(), places, wrapped, tables }
    }

    /// All tables, one after the other.
    pub fn levels(&self) -> Arc<[f32]> {
        /// One for each number of state bits and of tables: decoders share them.
        static FOUND: [[OnceLock<Arc<[f32]>>; TABLES + 1]; MOST_STATE_BITS as usize + 1] =
            [const { [const { OnceLock::new() }; TABLES + 1] }; MOST_STATE_BITS as usize + 1];
        let found = &FOUND[self.state_bits as usize][self.tables];
        if let Some(levels) = found.get() {
            return levels.clone();
        }
        // Made outside of the lock, which a process that is forked meanwhile would wait for.
        let made = (0..self.tables).flat_map(|table| levels(self.state_bits, table)).collect();
        found.get_or_init(|| made).clone()
    }
}

/// Which table each column reads: the first one, but where no bits are added the one after that of the next column, whose
/// window is the same. After the last column comes the first one.
fn tables(column_bits: &[u8]) -> Vec<usize> {
    let dim = column_bits.len();
    let Some(last) = column_bits.iter().rposition(|bits| *bits > 0) else { return vec![0; dim] };
    let mut tables = vec![0; dim];
    for step in 1..dim {
        let t = (last + dim - step) % dim;
        if column_bits[t] == 0 {
            tables[t] = (tables[(t + 1) % dim] + 1) % TABLES;
        }
    }
    tables
}

/// Columns from `from - 1` down to `from`, past the first one to the last one.
struct Order {
    columns: Vec<usize>,
    steps: Vec<Step>,
    ways: usize,
}

impl Order {
    fn new(layout: &Layout, scales: &[f32], from: usize) -> Self {
        let columns: Vec<usize> = (0..from).rev().chain((from..scales.len()).rev()).collect();
        let step = |t: &usize| {
            let bits = u32::from(layout.column_bits[*t]);
            Step { bits, table: layout.places[*t].table, scale: scales[*t] }
        };
        let steps: Vec<Step> = columns.iter().map(step).collect();
        Order { columns, ways: ways(layout), steps }
    }
}

/// Bytes of the ways back that a search keeps.
pub fn ways(layout: &Layout) -> usize {
    let way = |bits: &u8| if *bits > 0 { 1usize << (layout.state_bits - u32::from(*bits)) } else { 0 };
    layout.column_bits.iter().map(way).sum()
}

/// Finds the best streams of rows.
pub struct Search<'a> {
    layout: &'a Layout,
    levels: &'a [f32],
    orders: [Order; 2],
    /// Bits at the seam that are tried after the rounds, at most.
    seams: usize,
}

/// Room for a search, and what it found.
pub struct Room {
    costs: Vec<f32>,
    least: Vec<f32>,
    back: Vec<u8>,
    values: Vec<f32>,
    /// The state of each column.
    pub states: Vec<u32>,
    best: Vec<u32>,
    seams: Vec<(f32, u32)>,
}

impl<'a> Search<'a> {
    /// A search for rows of which a value is near its level times its column's scale.
    pub fn new(layout: &'a Layout, levels: &'a [f32], scales: &[f32]) -> Self {
        let orders = [scales.len() / 2, 0].map(|from| Order::new(layout, scales, from));
        let work = scales.len() << layout.state_bits;
        let short = layout.bits < SHORT * layout.state_bits;
        Search { layout, levels, orders, seams: if short { (MOST_WORK / work).saturating_sub(ROUNDS) } else { 0 } }
    }

    /// Room for one thread.
    pub fn room(&self) -> Room {
        let (states, dim) = (1usize << self.layout.state_bits, self.layout.places.len());
        Room {
            costs: vec![0.0; states],
            least: vec![0.0; states + SWEEP_PADDING],
            back: vec![0; self.orders[0].ways],
            values: vec![0.0; dim],
            states: vec![0; dim],
            best: vec![0; dim],
            seams: Vec::new(),
        }
    }

    /// Leaves the states of the best stream for a row in the room. The seam is where a row is cut to be searched: what
    /// stands there is taken from a search with the seam elsewhere.
    pub fn run(&self, row: &[f32], room: &mut Room) {
        let (mut start, mut least) = (None, f32::INFINITY);
        for round in 0..ROUNDS {
            least = self.round(&self.orders[round % 2], row, start, room);
            let next = &self.orders[(round + 1) % 2];
            let before = next.columns[next.columns.len() - 1];
            start = Some(room.states[before] & self.kept(next));
        }
        if self.seams > 0 {
            self.try_seams(row, least, room);
        }
    }

    /// Looks for a stream better than the one in the room, whose squared error is `least`, among those with other bits at
    /// the seam. An open search says how good any stream with these bits can be, and the most promising are tried.
    fn try_seams(&self, row: &[f32], mut least: f32, room: &mut Room) {
        let order = &self.orders[1];
        let kept = self.kept(order);
        room.best.copy_from_slice(&room.states);
        self.sweep(order, row, None, room);
        let mut seams = std::mem::take(&mut room.seams);
        seams.clear();
        seams.extend((0..=kept).map(|seam| (f32::INFINITY, seam)));
        for (state, cost) in room.costs.iter().enumerate() {
            let bound = &mut seams[state & kept as usize].0;
            *bound = bound.min(*cost);
        }
        seams.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        for (bound, seam) in &seams[..self.seams.min(seams.len())] {
            if *bound >= least {
                break;
            }
            let found = self.round(order, row, Some(*seam), room);
            if found < least {
                least = found;
                room.best.copy_from_slice(&room.states);
            }
        }
        room.seams = seams;
        room.states.copy_from_slice(&room.best);
    }

    /// The bits of a state that stay in it at the first step.
    fn kept(&self, order: &Order) -> u32 {
        (1 << (self.layout.state_bits - order.steps[0].bits)) - 1
    }

    fn sweep(&self, order: &Order, row: &[f32], start: Option<u32>, room: &mut Room) {
        for (value, t) in room.values.iter_mut().zip(&order.columns) {
            *value = row[*t];
        }
        let (state_bits, values) = (self.layout.state_bits, &room.values);
        let sweep = Sweep { state_bits, steps: &order.steps, values, levels: self.levels, start };
        (kernels::best().sweep)(&sweep, &mut room.costs, &mut room.least, &mut room.back);
    }

    /// Leaves the best states in the room, and gives their squared error.
    fn round(&self, order: &Order, row: &[f32], start: Option<u32>, room: &mut Room) -> f32 {
        let state_bits = self.layout.state_bits;
        self.sweep(order, row, start, room);
        // The stream has to close: the last state is the one before the first.
        let (from, by) = start.map_or((0, 1), |start| (start, self.kept(order) + 1));
        let (mut state, mut least) = (from, f32::INFINITY);
        for candidate in (from..1 << state_bits).step_by(by as usize) {
            if room.costs[candidate as usize] < least {
                (state, least) = (candidate, room.costs[candidate as usize]);
            }
        }
        let mut back = order.ways;
        for (t, step) in order.columns.iter().zip(&order.steps).rev() {
            room.states[*t] = state;
            if step.bits > 0 {
                back -= 1 << (state_bits - step.bits);
                let head = state >> step.bits;
                state = u32::from(room.back[back + head as usize]) << (state_bits - step.bits) | head;
            }
        }
        least
    }

    /// Writes the stream of the states that were found to the start of a code, whose bytes are zero.
    pub fn write(&self, room: &Room, code: &mut [u8]) {
        let mut at = 0;
        for (state, bits) in room.states.iter().zip(&self.layout.column_bits) {
            for bit in 0..usize::from(*bits) {
                code[(at + bit) / 8] |= ((state >> bit & 1) as u8) << ((at + bit) % 8);
            }
            at += usize::from(*bits);
        }
    }

    /// The levels of the states that were found.
    pub fn found<'b>(&'b self, room: &'b Room) -> impl Iterator<Item = f32> + 'b {
        let level = |(state, place): (&u32, &Place)| self.levels[(place.table + state) as usize];
        room.states.iter().zip(&self.layout.places).map(level)
    }
}

#[cfg(test)]
mod tests;
