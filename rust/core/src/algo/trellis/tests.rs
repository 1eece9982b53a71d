use super::*;
use crate::kernels::fence::Fence;
use crate::kernels::{Ids, Kernels, Rows, TrellisView};
use crate::rng::Rng;
use proptest::prelude::*;

/// The window of each column in a stream.
fn windows(layout: &Layout, stream: u64) -> Vec<u32> {
    let mut at = 0;
    let mut states = Vec::new();
    for bits in &layout.column_bits {
        let bit = |i: u32| (stream >> ((at + i) % layout.bits) & 1) as u32;
        states.push((0..layout.state_bits).map(|i| bit(i) << i).sum());
        at += u32::from(*bits);
    }
    states
}

fn error(layout: &Layout, levels: &[f32], scales: &[f32], states: &[u32], row: &[f32]) -> f64 {
    let one = |t: usize| {
        let level = levels[(layout.places[t].table + states[t]) as usize];
        (f64::from(row[t]) - f64::from(level) * f64::from(scales[t])).powi(2)
    };
    (0..row.len()).map(one).sum()
}

fn row(rng: &mut Rng, dim: usize) -> Vec<f32> {
    (0..dim).map(|_| rng.normal() as f32).collect()
}

#[test]
fn streams_close_and_are_near_the_best() {
    let rng = &mut Rng::new(1);
    let (mut found, mut best, mut exact) = (0.0, 0.0, 0);
    let shapes: [(&[u8], u32); 5] =
        [(&[1; 12], 4), (&[2; 6], 4), (&[3, 2, 2, 1, 1, 0, 0], 4), (&[0, 1, 1, 0, 0, 2, 1, 0], 3), (&[4, 4, 3], 5)];
    for (column_bits, state_bits) in shapes {
        let layout = Layout::new(column_bits, state_bits);
        let levels = layout.levels();
        let scales: Vec<f32> = (0..column_bits.len()).map(|_| 0.5 + rng.uniform() as f32).collect();
        let search = Search::new(&layout, &levels, &scales);
        let mut room = search.room();
        for _ in 0..20 {
            let row = row(rng, column_bits.len());
            search.run(&row, &mut room);
            let mut code = [0; 8];
            search.write(&room, &mut code);
            assert_eq!(windows(&layout, u64::from_le_bytes(code)), room.states, "the seam");
            let ours = error(&layout, &levels, &scales, &room.states, &row);
            let all = (0..1u64 << layout.bits)
                .map(|stream| error(&layout, &levels, &scales, &windows(&layout, stream), &row))
                .fold(f64::INFINITY, f64::min);
            assert!(ours >= all - 1e-5, "{ours} {all}");
            (found, best, exact) = (found + ours, best + all, exact + usize::from(ours < all + 1e-5));
        }
    }
    assert!(found < 1.01 * best && exact > 90, "{found} {best} {exact}");
}

#[test]
fn a_search_between_given_ends_is_exact() {
    // Brute force over all streams whose windows at the seam are those that the search was given.
    let rng = &mut Rng::new(2);
    let layout = Layout::new(&[1, 2, 0, 1, 1, 2, 1], 4);
    let (levels, scales) = (layout.levels(), [1.0; 7]);
    let search = Search::new(&layout, &levels, &scales);
    let mut room = search.room();
    for start in 0..8 {
        let row = row(rng, 7);
        search.round(&search.orders[1], &row, Some(start), &mut room);
        let mut code = [0; 8];
        search.write(&room, &mut code);
        let ours = error(&layout, &levels, &scales, &windows(&layout, u64::from_le_bytes(code)), &row);
        let all = (0..1u64 << layout.bits)
            .map(|stream| windows(&layout, stream))
            .filter(|states| states[0] & 7 == start)
            .map(|states| error(&layout, &levels, &scales, &states, &row))
            .fold(f64::INFINITY, f64::min);
        assert!((ours - all).abs() < 1e-5, "{start}: {ours} {all}");
    }
}

#[test]
fn levels_are_the_normal_quantiles_spread_both_ways() {
    for state_bits in [1, 2, 5, 8, 11, 12] {
        for table in [0, 3] {
            let levels = levels(state_bits, table);
            let mut sorted = levels.clone();
            sorted.sort_by(f32::total_cmp);
            assert!(sorted.windows(2).all(|pair| pair[0] < pair[1]), "{state_bits}");
            let variance = levels.iter().map(|v| v * v).sum::<f32>() / levels.len() as f32;
            assert!(state_bits < 8 || (0.97..1.0).contains(&variance), "{variance}");
            let rank = |state: usize| sorted.partition_point(|v| *v < levels[state]);
            for bits in 1..=(state_bits / 2).min(5) {
                let (part, heads) = (state_bits - bits, 1usize << (state_bits - bits));
                for head in 0..heads {
                    let after = (0..1 << bits).map(|low| 1usize << (rank(head << bits | low) >> part));
                    let before = (0..1 << bits).map(|high| 1usize << (rank(high << part | head) >> part));
                    assert_eq!(after.sum::<usize>(), (1 << (1 << bits)) - 1);
                    assert_eq!(before.sum::<usize>(), (1 << (1 << bits)) - 1);
                }
            }
        }
    }
    assert!((quantile(0.025) + 1.959964).abs() < 1e-6 && (quantile(1e-4) + 3.719016).abs() < 1e-6);
}

#[test]
fn normal_rows() {
    // Relative error of rows of 128 normal values, with no scale a row; Shannon's bound is 4^-bits.
    let rng = &mut Rng::new(3);
    let rows: Vec<Vec<f32>> = (0..24).map(|_| row(rng, 128)).collect();
    for (state_bits, bits, gain, limit) in
        [(8, 2, 1.0, 0.0770), (12, 1, 0.87, 0.2800), (12, 2, 1.0, 0.0715), (12, 3, 1.0, 0.0185)]
    {
        let layout = Layout::new(&[bits; 128], state_bits);
        let (levels, scales) = (layout.levels(), [gain; 128]);
        let search = Search::new(&layout, &levels, &scales);
        let mut room = search.room();
        let (mut lost, mut all) = (0.0, 0.0);
        for row in &rows {
            search.run(row, &mut room);
            lost += error(&layout, &levels, &scales, &room.states, row);
            all += row.iter().map(|v| f64::from(v * v)).sum::<f64>();
        }
        assert!(lost / all < limit, "{state_bits} {bits}: {}", lost / all);
    }
}

/// Bit patterns, as NaN is equal to nothing.
fn numbers(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

proptest! {
    #![proptest_config(kernels::tests::cases(100))]

    #[test]
    fn every_path_gives_the_same_bits(seed: u64, state_bits in 1u32..11, column_bits in prop::collection::vec(0u8..9, 1..40), rows in 1usize..6,
               scale_bits in 0u32..9, n in 0usize..100, spare in 0usize..3, fixed: bool, coarse: bool) {
        let (_fence, rng) = (Fence::new(), &mut Rng::new(seed));
        let column_bits: Vec<u8> = column_bits.iter().map(|bits| (*bits).min(state_bits as u8)).collect();
        let layout = Layout::new(&column_bits, state_bits);
        prop_assume!(layout.bits >= state_bits);
        let dim = column_bits.len();
        let mut levels = row(rng, layout.tables << state_bits);
        if coarse {
            // Almost all costs are equal to others.
            levels.iter_mut().for_each(|v| *v = v.round());
        }
        let columns = row(rng, dim);

        let row_bytes = (layout.bits + scale_bits).div_ceil(8) as usize + spare;
        let codes: Vec<u8> = (0..rows * row_bytes).map(|_| rng.below(256) as u8).collect();
        let scales = row(rng, 1 << scale_bits);
        let view = TrellisView { dim, row_bytes, bits: layout.bits, state_bits, scale_bits, places: &layout.places,
                                 wrapped: layout.wrapped, levels: &levels, columns: &columns, scales: &scales };
        let ids: Vec<i64> = (0..n).map(|_| rng.below(rows) as i64).collect();
        let task = Rows { codes: &codes, ids: Ids::I64(&ids), range: n / 3..n, stream: false };
        let decoded = |kernels: &Kernels| {
            let mut out = vec![f32::NAN; (n - n / 3) * dim];
            (kernels.decode_trellis)(&view, &task, &mut out);
            out
        };

        let steps: Vec<Step> = (0..dim).rev().map(|t| {
            Step { bits: u32::from(column_bits[t]), table: layout.places[t].table, scale: columns[t] }
        }).collect();
        let open = state_bits - steps[0].bits;
        let start = fixed.then(|| rng.below(1 << open) as u32);
        let values = row(rng, dim);
        let sweep = Sweep { state_bits, steps: &steps, values: &values, levels: &levels, start };
        let swept = |kernels: &Kernels| {
            let states = 1 << state_bits;
            let (mut costs, mut least) = (vec![f32::NAN; states], vec![0.0; states + SWEEP_PADDING]);
            let mut back = vec![0; ways(&layout)];
            (kernels.sweep)(&sweep, &mut costs, &mut least, &mut back);
            // The first step has no way back.
            let first = if steps[0].bits > 0 { states >> steps[0].bits } else { 0 };
            (costs, back[first..].to_vec())
        };
        let all = kernels::available();
        let (expected, (costs, back)) = (decoded(all[0]), swept(all[0]));
        for kernels in all {
            prop_assert_eq!(numbers(&decoded(kernels)), numbers(&expected), "{}", kernels.name);
            let (its_costs, its_back) = swept(kernels);
            prop_assert_eq!(numbers(&its_costs), numbers(&costs), "{}", kernels.name);
            prop_assert_eq!(&its_back, &back, "{}", kernels.name);
        }
    }
}
