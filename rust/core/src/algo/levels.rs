//! Quantizers of single numbers: the nearest of some levels, the scale that suits them best, and the best levels.

/// Most levels of a [`LevelTable`].
pub const MOST_LEVELS: usize = 256;

/// Levels that are compared with one after the other; of more, cells of equal width say where to begin.
const FEW: usize = 16;

/// Cells between the first and the last bound.
const CELLS: usize = 2048;

/// Numbers that are looked up side by side.
const RUN: usize = 64;

/// Levels, and where between them a number goes to the next one.
#[derive(Clone, Debug)]
pub struct LevelTable {
    /// The levels by their place.
    values: Vec<f32>,
    /// Places in the order of their levels; of equal levels the first place alone.
    order: Vec<u8>,
    /// Half-way between two levels, in order.
    bounds: Vec<f32>,
    /// For each cell, how many bounds lie below the cell before it; none where levels are few.
    cells: Vec<u8>,
    /// Cells in a difference of 1.
    density: f32,
    reach: f32,
}

impl LevelTable {
    /// A table of up to [`MOST_LEVELS`] finite levels, some of them not zero.
    pub fn new(values: &[f32]) -> Self {
        assert!((1..=MOST_LEVELS).contains(&values.len()), "number of levels");
        let mut order: Vec<usize> = (0..values.len()).collect();
        // Adding zero makes a negative zero positive: the two are equal. The sort is stable.
        order.sort_by(|a, b| (values[*a] + 0.0).total_cmp(&(values[*b] + 0.0)));
        order.dedup_by(|next, kept| values[*next] == values[*kept]);
        let bounds: Vec<f32> = order.windows(2).map(|pair| (values[pair[0]] + values[pair[1]]) / 2.0).collect();
        let (mut cells, mut density) = (Vec::new(), 0.0);
        if let (Some(first), Some(last), false) = (bounds.first(), bounds.last(), bounds.len() < FEW) {
            density = CELLS as f32 / (last - first);
            let start = |cell: usize| first + (cell.max(1) - 1) as f32 / density;
            cells = (0..CELLS).map(|cell| bounds.partition_point(|bound| *bound < start(cell)) as u8).collect();
        }
        let reach = values.iter().fold(0f32, |reach, value| reach.max(value.abs()));
        let order = order.into_iter().map(|place| place as u8).collect();
        LevelTable { values: values.to_vec(), order, bounds, cells, density, reach }
    }

    /// The largest magnitude of a level.
    pub fn reach(&self) -> f32 {
        self.reach
    }

    /// Places of the levels nearest to `values / scale`, the higher one of two that are equally near. A scale of zero
    /// gives the level nearest to zero.
    pub fn nearest(&self, values: &[f32], scale: f32, places: &mut [u8]) {
        let mut ratios = [0f32; RUN];
        for (values, places) in values.chunks(RUN).zip(places.chunks_mut(RUN)) {
            let ratios = &mut ratios[..values.len()];
            for (ratio, value) in ratios.iter_mut().zip(values) {
                // A division, because the inverse of a denormal scale overflows.
                *ratio = if scale == 0.0 { 0.0 } else { value / scale };
            }
            match self.bounds.len() < FEW {
                true => self.count(ratios, places),
                false => self.walk(ratios, places),
            }
        }
    }

    /// Each bound that a ratio reaches is one level more.
    fn count(&self, ratios: &[f32], places: &mut [u8]) {
        let mut ranks = [0i32; RUN];
        for bound in &self.bounds {
            for (rank, ratio) in ranks.iter_mut().zip(ratios) {
                *rank += i32::from(ratio >= bound);
            }
        }
        places.iter_mut().zip(ranks).for_each(|(place, rank)| *place = self.order[rank as usize]);
    }

    /// From the cell before a ratio's own, so that the rounding of its number does not matter, up to the ratio.
    fn walk(&self, ratios: &[f32], places: &mut [u8]) {
        for (place, ratio) in places.iter_mut().zip(ratios) {
            let cell = ((ratio - self.bounds[0]) * self.density).clamp(0.0, (CELLS - 1) as f32) as usize;
            let mut rank = usize::from(self.cells[cell]);
            while rank < self.bounds.len() && *ratio >= self.bounds[rank] {
                rank += 1;
            }
            *place = self.order[rank];
        }
    }

    /// Products of values with the levels at their places, and squares of those levels, in float64.
    pub fn products(&self, values: &[f32], places: &[u8]) -> (f64, f64) {
        let (mut product, mut square) = (0.0, 0.0);
        for (value, place) in values.iter().zip(places) {
            let level = f64::from(self.values[usize::from(*place)]);
            product += f64::from(*value) * level;
            square += level * level;
        }
        (product, square)
    }

    /// The squared error of values that stand at these places, times the scale.
    pub fn error(&self, values: &[f32], places: &[u8], scale: f32) -> f64 {
        let difference =
            |value: &f32, place: &u8| f64::from(*value) - f64::from(self.values[usize::from(*place)] * scale);
        values.iter().zip(places).map(|(value, place)| difference(value, place).powi(2)).sum()
    }

    /// From a scale, alternates nearest levels and the least-squares scale for them while the error falls, `rounds` times
    /// at most. Gives the last scale; `places` are those that it was computed from.
    pub fn refine(&self, values: &[f32], scale: f32, rounds: usize, places: &mut [u8]) -> f32 {
        let (mut best, mut explained) = (scale, 0.0);
        let mut next = vec![0u8; values.len()];
        for _ in 0..rounds {
            self.nearest(values, best, &mut next);
            let (product, square) = self.products(values, &next);
            // With its best scale, a code explains this much of the squared norm.
            let gain = if square > 0.0 { product * product / square } else { 0.0 };
            if !(gain > explained && product > 0.0) {
                break;
            }
            explained = gain;
            best = (product / square) as f32;
            places.copy_from_slice(&next);
        }
        if explained == 0.0 {
            self.nearest(values, best, places);
        }
        best
    }
}

/// The `count` levels with the least squared error for some values, in order: one-dimensional k-means, solved exactly by
/// dynamic programming (Wang and Song, 2011). Fewer where there are fewer values.
pub fn best_levels(values: &[f32], count: usize) -> Vec<f32> {
    let mut sorted: Vec<f64> = values.iter().map(|value| f64::from(*value)).collect();
    sorted.sort_by(f64::total_cmp);
    let (length, middle) = (sorted.len(), sorted.get(sorted.len() / 2).copied().unwrap_or(0.0));
    // Sums of what is left of a middle value lose fewer bits.
    let mut sums = vec![(0.0, 0.0)];
    for value in &sorted {
        let (value, (sum, square)) = (value - middle, sums[sums.len() - 1]);
        sums.push((sum + value, square + value * value));
    }
    let mean = |from: usize, to: usize| (sums[to].0 - sums[from].0) / (to - from) as f64;
    let cost = |from: usize, to: usize| {
        let sum: f64 = sums[to].0 - sums[from].0;
        (sums[to].1 - sums[from].1 - sum * sum / (to - from) as f64).max(0.0)
    };
    let count = count.min(length);
    // least[to]: the error of the first `to` values with the levels so far; starts[level][to]: where the last one begins.
    let mut least: Vec<f64> = (0..=length).map(|to| if to == 0 { 0.0 } else { cost(0, to) }).collect();
    let mut starts = vec![vec![0; length + 1]];
    for level in 1..count {
        let mut next = vec![f64::INFINITY; length + 1];
        let mut begin = vec![0; length + 1];
        // The best start never moves back as the end moves on: halve the ends, and each half has half of the starts.
        let mut parts = vec![(level + 1, length, level, length - 1)];
        while let Some((low, high, first, last)) = parts.pop() {
            if low > high {
                continue;
            }
            let to = low + (high - low) / 2;
            for from in first..=last.min(to - 1) {
                let error = least[from] + cost(from, to);
                if error < next[to] {
                    (next[to], begin[to]) = (error, from);
                }
            }
            let best = begin[to].max(first);
            parts.push((low, to - 1, first, best));
            parts.push((to + 1, high, best, last));
        }
        least = next;
        starts.push(begin);
    }
    let (mut levels, mut to) = (vec![0.0; count], length);
    for level in (0..count).rev() {
        let from = if level == 0 { 0 } else { starts[level][to] };
        levels[level] = (mean(from, to) + middle) as f32;
        to = from;
    }
    levels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn normal(count: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed);
        (0..count).map(|_| rng.normal() as f32).collect()
    }

    fn error(values: &[f32], levels: &[f32]) -> f64 {
        let nearest =
            |value: &f32| levels.iter().map(|level| f64::from(value - level).powi(2)).fold(f64::MAX, f64::min);
        values.iter().map(nearest).sum()
    }

    #[test]
    fn the_nearest_level_is_found() {
        let values = normal(300, 1);
        for count in [1, 2, 3, 15, 16, 17, 100, 253, 256] {
            let mut levels = normal(count, 2);
            levels[0] = -0.0;
            if count > 2 {
                levels[1] = 0.0;
            }
            let table = LevelTable::new(&levels);
            let mut places = vec![0; values.len()];
            table.nearest(&values, 0.5, &mut places);
            let scaled: Vec<f32> = levels.iter().map(|level| level * 0.5).collect();
            assert!((table.error(&values, &places, 0.5) - error(&values, &scaled)).abs() < 1e-5, "{count}");
            table.nearest(&values, 0.0, &mut places);
            assert!(places.iter().all(|place| levels[usize::from(*place)] == 0.0 || count < 2));
        }
    }

    #[test]
    fn refining_never_raises_the_error() {
        for bits in 1..=8 {
            let table = LevelTable::new(&crate::algo::lloyd_max::normal_levels(bits));
            let (values, mut places, mut refined) = (normal(100, u64::from(bits)), vec![0; 100], vec![0; 100]);
            table.nearest(&values, 1.1, &mut places);
            let scale = table.refine(&values, 1.1, 8, &mut refined);
            assert!(table.error(&values, &refined, scale) <= table.error(&values, &places, 1.1));
        }
    }

    #[test]
    fn the_best_levels_are_the_best() {
        // All ways to cut seven values into three runs.
        for seed in 0..20 {
            let mut values = normal(7, seed);
            values.sort_by(f32::total_cmp);
            let mean = |part: &[f32]| part.iter().sum::<f32>() / part.len() as f32;
            let mut least = f64::MAX;
            for a in 1..6 {
                for b in a + 1..7 {
                    let levels = [mean(&values[..a]), mean(&values[a..b]), mean(&values[b..])];
                    least = least.min(error(&values, &levels));
                }
            }
            assert!((error(&values, &best_levels(&values, 3)) - least).abs() < 1e-5);
        }
        assert_eq!(best_levels(&[3.0, 1.0], 16), [1.0, 3.0]);
        assert_eq!(best_levels(&[2.0; 5], 2), [2.0, 2.0]);
        assert!(best_levels(&[], 4).is_empty());
    }
}
