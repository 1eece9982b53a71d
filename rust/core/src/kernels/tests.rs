//! Every path against the scalar one, bit by bit, in memory that ends where slices end.

use super::fence::Fence;
use super::*;
use crate::rng::Rng;
use proptest::prelude::*;

/// So many, or as `PROPTEST_CASES` says: tools that watch each access make tests a hundred times slower.
pub(crate) fn cases(count: u32) -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok());
    ProptestConfig::with_cases(asked.unwrap_or(if cfg!(miri) { 2 } else { count }))
}

fn floats(rng: &mut Rng, count: usize) -> Vec<f32> {
    // Some coarse numbers, so that there are ties.
    (0..count).map(|_| if rng.below(4) == 0 { rng.below(5) as f32 - 2.0 } else { rng.normal() as f32 }).collect()
}

fn same(a: &[f32], b: &[f32]) -> Result<(), TestCaseError> {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    prop_assert_eq!(bits(a), bits(b));
    Ok(())
}

/// Packed centres in bfloat16, and the largest error.
fn rounded(packed: &[f32], width: usize, block: usize) -> (Vec<u32>, f32) {
    let pairs = width.div_ceil(2);
    let (mut words, mut errors) = (vec![0; packed.len() / width * pairs], vec![0.0f64; packed.len() / width]);
    for (i, value) in packed.iter().enumerate() {
        let (group, t, j) = (i / (width * block), i / block % width, i % block);
        let near = if value.is_normal() { half::bf16::from_f32(*value) } else { half::bf16::ZERO };
        words[(group * pairs + t / 2) * block + j] |= u32::from(near.to_bits()) << (16 * (t % 2));
        errors[group * block + j] += (f64::from(*value) - near.to_f64()).powi(2);
    }
    (words, (errors.into_iter().fold(0.0, f64::max).sqrt() * 1.000001) as f32)
}

#[derive(Clone)]
enum Stored {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Bf16(Vec<u16>),
    I8(Vec<i8>),
}

impl Stored {
    fn new(kind: usize, values: &[f32]) -> Self {
        match kind {
            0 => Stored::F32(values.to_vec()),
            1 => Stored::F16(values.iter().map(|v| half::f16::from_f32(*v).to_bits()).collect()),
            2 => Stored::Bf16(values.iter().map(|v| half::bf16::from_f32(*v).to_bits()).collect()),
            _ => Stored::I8(values.iter().map(|v| (v * 40.0) as i8).collect()),
        }
    }
    fn view(&self) -> Values<'_> {
        match self {
            Stored::F32(values) => Values::F32(values),
            Stored::F16(values) => Values::F16(values),
            Stored::Bf16(values) => Values::Bf16(values),
            Stored::I8(values) => Values::I8(values),
        }
    }
}

/// `(width, starts)` of the groups and the row's width: parts side by side of one or two widths, full rows, or anything.
fn places(layout: usize, books: usize, width: usize, rng: &mut Rng) -> (Vec<(usize, Vec<usize>)>, usize) {
    let beside = |from: usize, width: usize| (width, (0..books).map(|m| from + m * width).collect::<Vec<_>>());
    match layout {
        0 => (vec![beside(0, width)], books * width),
        1 => (vec![beside(0, width + 1), beside(books * (width + 1), width)], books * (2 * width + 1)),
        2 => (vec![(width, vec![0; books])], width),
        _ => {
            let dim = width + 3;
            let group = |rng: &mut Rng| {
                let width = 1 + rng.below(width);
                (width, (0..books).map(|_| rng.below(dim - width + 1)).collect())
            };
            (vec![group(rng), group(rng)], dim)
        }
    }
}

/// Ids with their borders of bags: some empty, some long.
fn bags(n: usize, rng: &mut Rng) -> Vec<i64> {
    let mut borders: Vec<i64> = (0..rng.below(8)).map(|_| rng.below(n + 1) as i64).chain([0, n as i64]).collect();
    borders.sort();
    borders
}

/// Lookups and pools of all paths, with ids of all types, from memory that is aligned or not.
fn lookups(
    codes: &[u8],
    rows: usize,
    dim: usize,
    n: usize,
    rng: &mut Rng,
    lookup: impl Fn(&Kernels, &Rows, Output),
    pool: impl Fn(&Kernels, &Bags, &mut [f32]),
) -> Result<(), TestCaseError> {
    let wide: Vec<i64> = (0..n).map(|_| rng.below(rows) as i64).collect();
    let narrow: Vec<i32> = wide.iter().map(|id| *id as i32).collect();
    let (before, weights, borders) = (floats(rng, n * dim), floats(rng, n), bags(n, rng));
    let start = rng.below(n + 1);
    let task = |ids, range: Range<usize>, stream| Rows { codes, ids, range, stream };
    let mut expected = before.clone();
    lookup(&scalar::KERNELS, &task(Ids::I64(&wide), 0..n, false), Output::F32(&mut expected));
    // NaN has many patterns; numbers that are not finite do not occur in tables.
    prop_assume!(expected.iter().all(|v| v.is_finite()));
    for kernels in available() {
        for (ids, stream) in [(Ids::I64(&wide), false), (Ids::I32(&narrow), true)] {
            for shift in [0, 1, 8] {
                let mut room = vec![f32::NAN; n * dim + 32];
                let place = (room.as_ptr().align_offset(64) + shift).min(32);
                let out = &mut room[place..][..n * dim];
                out.copy_from_slice(&before);
                lookup(kernels, &task(ids, start..n, stream), Output::F32(&mut out[start * dim..]));
                lookup(kernels, &task(ids, 0..start, stream), Output::F32(&mut out[..start * dim]));
                same(out, &expected)?;
                prop_assert!(room[..place].iter().chain(&room[place + n * dim..]).all(|v| v.is_nan()));
                let mut room = vec![7; n * dim + 64];
                let place = (room.as_ptr().align_offset(64) + shift).min(64);
                let halves = &mut room[place..][..n * dim];
                lookup(kernels, &task(ids, 0..n, stream), Output::F16(halves));
                prop_assert!(halves.iter().zip(&expected).all(|(got, v)| *got == half::f16::from_f32(*v).to_bits()));
                lookup(kernels, &task(ids, 0..n, stream), Output::Bf16(halves));
                prop_assert!(halves.iter().zip(&expected).all(|(got, v)| *got == half::bf16::from_f32(*v).to_bits()));
                prop_assert!(room[..place].iter().chain(&room[place + n * dim..]).all(|v| *v == 7));
            }
            // Nothing behind the last row.
            let mut out = before.clone();
            lookup(kernels, &task(ids, 0..n, stream), Output::F32(&mut out));
            same(&out, &expected)?;
            let (mut f16, mut bf16) = (vec![0; n * dim], vec![0; n * dim]);
            lookup(kernels, &task(ids, 0..n, stream), Output::F16(&mut f16));
            lookup(kernels, &task(ids, 0..n, stream), Output::Bf16(&mut bf16));
            prop_assert!(f16.iter().zip(&expected).all(|(got, v)| *got == half::f16::from_f32(*v).to_bits()));
            prop_assert!(bf16.iter().zip(&expected).all(|(got, v)| *got == half::bf16::from_f32(*v).to_bits()));
        }
        for (weights, max) in [(None, false), (Some(&weights[..]), false), (None, true)] {
            for resume in [false, true] {
                let rows = task(Ids::I64(&wide), 0..n, false);
                let bags = Bags { rows, borders: &borders, weights, max, resume };
                let start = &floats(&mut Rng::new(1), (borders.len() - 1) * dim);
                let (mut one, mut all) = (start.clone(), start.clone());
                pool(&scalar::KERNELS, &bags, &mut one);
                pool(kernels, &bags, &mut all);
                same(&all, &one)?;
                if let (false, Some([from, to])) = (resume, borders.windows(2).find(|bag| bag[0] < bag[1])) {
                    // What a pool is, said with the rows of a lookup.
                    let bag = borders.iter().position(|border| border == from).unwrap_or(0);
                    let bag = bag + borders[bag..].iter().take_while(|border| *border == from).count() - 1;
                    for t in 0..dim {
                        let row = |i: i64| expected[i as usize * dim + t];
                        let weight = |i: i64| weights.map_or(1.0, |weights| weights[i as usize]);
                        let value = match max {
                            true => (*from..*to).map(row).reduce(|a, b| if b > a { b } else { a }),
                            false => Some((*from..*to).fold(0.0, |sum, i| row(i).mul_add(weight(i), sum))),
                        };
                        prop_assert_eq!(value.map(f32::to_bits), Some(all[bag * dim + t].to_bits()));
                    }
                }
            }
        }
    }
    Ok(())
}

#[allow(clippy::too_many_arguments)] // what is drawn
fn levels_of(
    dim: usize,
    symmetric: bool,
    form: usize,
    block: usize,
    spare: usize,
    level: Level,
    meaning: Meaning,
    n: usize,
    rng: &mut Rng,
) -> Result<(), TestCaseError> {
    let (scale, offset) = (floats(rng, dim), floats(rng, dim));
    let number = matches!(meaning, Meaning::Number);
    let narrow = symmetric && matches!(level, Level::Bits(_));
    let scales = match form {
        0 => Scales::None,
        1 if number => Scales::Columns { scale: &scale, offset: &offset },
        1 => Scales::Columns { scale: &scale, offset: &[] },
        _ => Scales::Row {
            block: block.min(dim),
            symmetric: symmetric || !number,
            narrow,
            scale_factor: 0.5,
            offset_factor: 4.0,
        },
    };
    let pair = if matches!(meaning, Meaning::Own) { 2 << level.bits() } else { 4 };
    let row_bytes = bits::row_bytes(dim, level.bits()) + pair * dim.div_ceil(block.min(dim)) + spare;
    let rows = 60;
    // Half precision without infinities: bytes of random finite numbers.
    let halves: Vec<u8> = floats(rng, (rows * row_bytes).div_ceil(2))
        .iter()
        .flat_map(|v| half::f16::from_f32(*v).to_bits().to_le_bytes())
        .collect();
    let codes = &halves[..rows * row_bytes].to_vec(); // nothing behind the last one
    let view = LevelsView { dim, row_bytes, level, meaning, scales };
    let lookup = |kernels: &Kernels, rows: &Rows, out: Output| (kernels.lookup_levels)(&view, rows, out);
    lookups(codes, rows, dim, n, rng, lookup, |kernels, bags, out| (kernels.pool_levels)(&view, bags, out))
}

proptest! {
    #![proptest_config(cases(600))]

    #[test]
    fn books(seed: u64, layout in 0usize..4, kind in 0usize..4, count in 1usize..10, width in 1usize..40,
             power: bool, bits in prop::sample::select(vec![1u32, 3, 4, 7, 8, 9, 12]), spare in 0usize..3, n in 0usize..70) {
        let (_fence, rng) = (Fence::new(), &mut Rng::new(seed));
        let width = if power { width.next_power_of_two() } else { width };
        let (places, dim) = places(layout, count, width, rng);
        let stored: Vec<Stored> = places.iter()
            .map(|(width, starts)| Stored::new(kind, &floats(rng, (width * starts.len()) << bits))).collect();
        let groups: Vec<Group> = stored.iter().zip(&places)
            .map(|(entries, (width, starts))| Group { entries: entries.view(), width: *width, starts }).collect();
        let books = groups.iter().map(|group| group.starts.len()).sum();
        let row_bytes = bits::row_bytes(books, bits) + spare;
        let scale = [1.0, 0.25, 8.0, 0.3][rng.below(4)];
        // Some of few bits, as tables have them.
        let short = |scale: f32| f32::from_bits(scale.to_bits() & !0xff);
        let mut scales = if kind == 3 { floats(rng, books) } else { Vec::new() };
        if rng.below(2) == 0 {
            scales.iter_mut().for_each(|scale| *scale = short(scale.abs().max(0.5)));
        }
        let view = BooksView { dim, bits, row_bytes, scale, scales: &scales, tiled: layout < 2, groups };
        let rows = 50;
        let codes: Vec<u8> = (0..rows * row_bytes).map(|_| rng.next_u64() as u8).collect();
        lookups(&codes, rows, dim, n, rng, |kernels, rows, out| (kernels.lookup_books)(&view, rows, out),
            |kernels, bags, out| (kernels.pool_books)(&view, bags, out))?;
    }

    #[test]
    fn levels(seed: u64, dim in 1usize..150, symmetric: bool, form in 0usize..4, block in 1usize..70, spare in 0usize..3,
              level in prop::sample::select(vec![Level::F16, Level::Bf16, Level::U8, Level::U4, Level::U2]), n in 0usize..70) {
        let (_fence, rng) = (Fence::new(), &mut Rng::new(seed));
        let (dim, block) = if form == 3 { (dim.next_multiple_of(32), block.next_multiple_of(16)) } else { (dim, block) };
        levels_of(dim, symmetric, form, block, spare, level, Meaning::Number, n, rng)?;
    }

    #[test]
    fn levels_of_any_width(seed: u64, dim in 1usize..150, bits in 1u32..9, form in 0usize..4, block in 1usize..70,
                           narrow: bool, spare in 0usize..3, meaning in 0usize..4, n in 0usize..70) {
        let (_fence, rng) = (Fence::new(), &mut Rng::new(seed));
        let (dim, block) = if form == 3 { (dim.next_multiple_of(32), block.next_multiple_of(16)) } else { (dim, block) };
        let table = floats(rng, TABLE_ENTRIES.max(1 << bits));
        let meaning = match meaning {
            0 => Meaning::Number,
            1 if form > 1 => Meaning::Own,
            _ => Meaning::Table(&table),
        };
        levels_of(dim, narrow, form, block, spare, Level::Bits(bits), meaning, n, rng)?;
    }

    #[test]
    fn tiles(seed: u64, rows in 1usize..68, width in 1usize..40, count in 1usize..68, gap in 0usize..5,
             size in prop::sample::select(vec![1.0f32, 1e-18, 1e-21, 1e-38, 1e12])) {
        let (_fence, rng) = (Fence::new(), &mut Rng::new(seed));
        let (stride, shift) = (width + gap, floats(rng, width));
        let (mut x, mut centers) = (floats(rng, rows * stride), floats(rng, count * width));
        let mut shift = shift;
        x.iter_mut().chain(&mut centers).chain(&mut shift).for_each(|v| *v *= size);
        #[allow(clippy::type_complexity)] // labels, two scores and two products of the first path
        let mut seen: Option<(Vec<u32>, Vec<f32>, Vec<f32>, Vec<f32>, Vec<f32>)> = None;
        for kernels in available() {
            let padded = rows.next_multiple_of(kernels.panel_rows);
            let mut panels = vec![f32::NAN; padded * width];
            (kernels.pack)(&x, stride, rows, &shift, &mut panels);
            let block = kernels.block_centers;
            let total = count.next_multiple_of(block);
            let center = |j: usize, t: usize| if j < count { centers[j * width + t] } else { 0.0 };
            let packed: Vec<f32> = (0..total * width)
                .map(|i| center(i / (block * width) * block + i % block, i / block % width)).collect();
            let half_norms: Vec<f32> = (0..total).map(|j| match j < count {
                true => (0..width).map(|t| center(j, t).powi(2)).sum::<f32>() / 2.0,
                false => f32::INFINITY,
            }).collect();
            let names: Vec<u32> = (0..total as u32).collect();
            let panel = width * kernels.panel_rows;
            let task = Panels { width, rows: &panels, stride: panel, centers: &packed, half_norms: &half_norms, labels: &names,
                next: x.as_ptr(), next_values: x.len() };
            let (mut labels, mut best, mut second) = (vec![7; padded], vec![0.0; padded], vec![0.0; padded]);
            (kernels.nearest)(&task, &mut labels, &mut best, &mut second);
            let (mut alone, mut lowest) = (vec![9; padded], vec![0.0; padded]);
            (kernels.nearest)(&task, &mut alone, &mut lowest, &mut []);
            prop_assert_eq!(&alone, &labels);
            same(&lowest, &best)?;
            if let Some(sift) = kernels.sift {
                let (pairs, error) = rounded(&packed, width, block);
                let norm = |from: &dyn Fn(usize) -> f32| (0..width).map(|t| f64::from(from(t)).powi(2)).sum::<f64>();
                let reach = (0..count).map(|j| norm(&|t| center(j, t))).fold(0.0, f64::max).sqrt() * 1.000001;
                let coarse = Coarse { pairs: &pairs, reach: reach as f32, error };
                let mut next = vec![0.0; padded];
                // With few centres the first pass has nothing to save, but what it finds is right.
                if sift(&task, &coarse, &mut Sifting::default(), &mut alone, &mut lowest, &mut []) {
                    prop_assert_eq!(&alone, &labels);
                    same(&lowest, &best)?;
                }
                if sift(&task, &coarse, &mut Sifting::default(), &mut alone, &mut lowest, &mut next) {
                    prop_assert_eq!(&alone, &labels);
                    same(&lowest, &best)?;
                    for row in 0..rows {
                        let n = norm(&|t| x[row * (width + gap) + t] - shift[t]).sqrt();
                        let steps = (width + 2) as f64 * (reach * reach / 2.0 + n * reach) + (n + reach).powi(2);
                        let sure = f64::from(second[row]) - f64::from(best[row]) > steps / f64::from(1 << 21);
                        prop_assert!(next[row] == second[row] || (sure && next[row] > second[row]));
                    }
                }
            }

            let wide = kernels.panel_centers;
            let packed: Vec<f32> = (0..count.next_multiple_of(wide) * width)
                .map(|i| center(i / (wide * width) * wide + i % wide, i / wide % width)).collect();
            let task = Products { width, x: &x, stride, rows, centers: &packed, count };
            let (mut dots, mut distances) = (vec![f32::NAN; rows * count], vec![f32::NAN; rows * count]);
            (kernels.dots)(&task, &mut dots);
            (kernels.distances)(&task, &mut distances);

            let got = (labels[..rows].to_vec(), best[..rows].to_vec(), second[..rows].to_vec(), dots, distances);
            match &seen {
                None => seen = Some(got),
                Some(expected) => {
                    prop_assert_eq!(&got.0, &expected.0);
                    same(&got.1, &expected.1)?;
                    same(&got.2, &expected.2)?;
                    same(&got.3, &expected.3)?;
                    same(&got.4, &expected.4)?;
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn extensions(seed: u64, rows in 0usize..10, count in 1usize..24, entries in 1usize..150, stage in 0usize..4,
                  wanted in 1usize..100, coarse: bool, with_tables: bool, spoiled: bool) {
        let (_fence, rng) = (Fence::new(), &mut Rng::new(seed));
        let mut numbers = |count: usize| -> Vec<f32> {
            let mut values = floats(rng, count + BEAM_PADDING);
            if coarse {
                // Almost all scores are equal to others.
                values.iter_mut().for_each(|v| *v = v.round());
            }
            values
        };
        let count = if stage == 0 { 1 } else { count };
        let mut products = numbers(rows * count * entries);
        let scores = &numbers(rows * count)[..rows * count];
        let mut half_norms = numbers(entries);
        half_norms[entries..].fill(f32::NAN);
        let tables: Vec<Vec<f32>> = (0..if with_tables { stage } else { 0 }).map(|_| numbers(entries * entries)).collect();
        let paths: Vec<u16> = (0..rows * count * stage).map(|_| rng.below(entries) as u16).collect();
        if spoiled {
            let size = products.len();
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                (0..size / 2).for_each(|_| products[rng.below(size)] = bad);
            }
        }
        let task = Extension { rows, count, entries, stage, scores, paths: &paths, half_norms: &half_norms,
                               products: &products, tables: &tables };
        let keep = wanted.min(count * entries);
        let run = |kernels: &Kernels| {
            let (mut scores, mut paths) = (vec![0.0; rows * keep], vec![0; rows * keep * (stage + 1)]);
            (kernels.extend)(&task, &mut scores, &mut paths);
            (scores, paths)
        };
        let expected = run(&scalar::KERNELS);
        for kernels in available() {
            let got = run(kernels);
            same(&got.0, &expected.0)?;
            prop_assert_eq!(&got.1, &expected.1, "{}", kernels.name);
        }
    }
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn descents(seed: u64, rows in 0usize..7, books in 1usize..7, entries in 1usize..150, sweeps in 0usize..5,
                kicks in 0usize..6, coarse: bool) {
        let (_fence, rng) = (Fence::new(), &mut Rng::new(seed));
        let mut numbers = |count: usize| -> Vec<f32> {
            let mut values = floats(rng, count + BEAM_PADDING);
            if coarse {
                // Almost all scores are equal to others.
                values.iter_mut().for_each(|v| *v = v.round());
            }
            values
        };
        let pairs: Vec<u16> = numbers((books * entries).pow(2)).iter().map(|v| half::f16::from_f32(*v).to_bits()).collect();
        let products: Vec<Vec<f32>> = (0..books).map(|_| numbers(rows * entries)).collect();
        let mut half_norms: Vec<Vec<f32>> = (0..books).map(|_| numbers(entries)).collect();
        half_norms.iter_mut().for_each(|norms| norms[entries..].fill(f32::NAN));
        let kicks: Vec<Kick> = (0..kicks).map(|_| Kick {
            shifts: (0..books).map(|_| rng.below(2) * rng.below(entries)).collect(),
            order: (0..books).map(|_| rng.below(books)).collect(),
        }).collect();
        let start: Vec<u16> = (0..rows * books).map(|_| rng.below(entries) as u16).collect();
        let task = Descent { rows, entries, half_norms: &half_norms, products: &products, pairs: &pairs, scale: 0.5,
                             sweeps, kicks: &kicks };
        let run = |kernels: &Kernels, task: &Descent| {
            let (mut codes, mut scores) = (start.clone(), vec![0.0; rows]);
            (kernels.descend)(task, &mut codes, &mut scores);
            (codes, scores)
        };
        let expected = run(&scalar::KERNELS, &task);
        for kernels in available() {
            let got = run(kernels, &task);
            same(&got.1, &expected.1)?;
            prop_assert_eq!(&got.0, &expected.0, "{}", kernels.name);
        }
        let before = run(&scalar::KERNELS, &Descent { sweeps: 0, kicks: &[], ..task }).1;
        prop_assert!(before.iter().zip(&expected.1).all(|(before, after)| after <= before));
    }
}

#[test]
fn pairs() {
    let _fence = Fence::new();
    for n in 0..=67 {
        let rng = &mut Rng::new(n as u64);
        let (x, start) = (floats(rng, n), floats(rng, n));
        let run = |kernels: &Kernels| {
            let mut out = start.clone();
            (kernels.axpy)(&mut out, &x, 0.3);
            out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        for kernels in available() {
            assert_eq!(run(kernels), run(&scalar::KERNELS), "{} {n}", kernels.name);
        }
    }
}

#[test]
fn rounding() {
    let _fence = Fence::new();
    // Every pattern of the upper half with lower halves around the ties of both types, denormals included.
    let lower = [0u32, 1, 0x0fff, 0x1000, 0x1001, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff];
    for low in lower {
        let x: Vec<f32> = (0..=0xffff_u32).map(|high| f32::from_bits(high << 16 | low)).collect();
        for kernels in available() {
            let (mut f16, mut bf16) = (vec![0; x.len()], vec![0; x.len()]);
            (kernels.to_f16)(&x, &mut f16);
            (kernels.to_bf16)(&x, &mut bf16);
            for (i, x) in x.iter().enumerate() {
                assert_eq!(f16[i], half::f16::from_f32(*x).to_bits(), "{} {x} {i}", kernels.name);
                assert_eq!(bf16[i], half::bf16::from_f32(*x).to_bits(), "{} {x} {i}", kernels.name);
            }
        }
    }
}

#[test]
fn grids() {
    let _fence = Fence::new();
    for n in 0..=67 {
        let rng = &mut Rng::new(n as u64);
        let (values, lows) = (floats(rng, n), floats(rng, n));
        let steps: Vec<f32> = floats(rng, n).iter().map(|v| (v.abs() - 0.5).max(0.0)).collect();
        for top in [3.0, 15.0, 255.0] {
            let grids = Grids { steps: &steps, lows: &lows, top };
            let mut expected = vec![0; n];
            (scalar::KERNELS.quantize)(&values, &grids, &mut expected);
            let error = (scalar::KERNELS.grid_error)(&values, 0.1, -1.0, top);
            for kernels in available() {
                let mut levels = vec![7; n];
                (kernels.quantize)(&values, &grids, &mut levels);
                assert_eq!(levels, expected, "{}", kernels.name);
                assert_eq!((kernels.grid_error)(&values, 0.1, -1.0, top).to_bits(), error.to_bits());
            }
            for t in 0..n {
                let place = (values[t] - lows[t]) / steps[t] + 0.5;
                assert_eq!(expected[t], if steps[t] == 0.0 { 0 } else { place.clamp(0.0, top) as u8 });
            }
        }
    }
}

#[test]
fn walsh_hadamard() {
    let _fence = Fence::new();
    for size in (0..12).map(|k| 1usize << k) {
        let values = floats(&mut Rng::new(size as u64), size);
        let mut expected = values.clone();
        for half in (0..size.ilog2()).map(|k| 1 << k) {
            for at in (0..size).filter(|at| at & half == 0) {
                let (a, b) = (expected[at], expected[at + half]);
                (expected[at], expected[at + half]) = (a + b, a - b);
            }
        }
        for kernels in available() {
            let mut got = values.clone();
            (kernels.hadamard)(&mut got, 0.3);
            assert!(got.iter().zip(&expected).all(|(got, v)| *got == v * 0.3), "{} {size}", kernels.name);
        }
    }
}

#[test]
fn packing_transposes() {
    let _fence = Fence::new();
    for kernels in available() {
        let (rows, width, stride) = (kernels.panel_rows + 3, 11, 13);
        let x: Vec<f32> = (0..rows * stride).map(|i| i as f32).collect();
        let shift = vec![1.0; width];
        let mut out = vec![f32::NAN; rows.next_multiple_of(kernels.panel_rows) * width];
        (kernels.pack)(&x, stride, rows, &shift, &mut out);
        for (i, value) in out.iter().enumerate() {
            let (t, r) = (i / kernels.panel_rows % width, i % kernels.panel_rows);
            let row = i / (kernels.panel_rows * width) * kernels.panel_rows + r;
            let expected = if row < rows { x[row * stride + t] - 1.0 } else { 0.0 };
            assert_eq!(*value, expected, "{} row {row} column {t}", kernels.name);
        }
    }
}

#[test]
fn the_yardstick_comes_to_an_end() {
    for kernels in available() {
        assert!((kernels.fma_peak)(1).is_finite(), "{}", kernels.name);
    }
}

#[test]
fn a_forced_path() {
    assert_eq!(choose(Some("scalar")).kernels.name, "scalar");
    assert!(choose(Some("scalar")).error.is_none() && choose(Some("")).error.is_none() && choose(None).error.is_none());
    let unknown = choose(Some("abacus"));
    assert_eq!(unknown.kernels.name, choose(None).kernels.name);
    assert!(unknown.error.unwrap().contains("VQRS_SIMD=abacus"));
}

#[test]
#[should_panic(expected = "entries of a book")]
fn a_short_book_is_refused() {
    let entries = [0.0; 7];
    let group = Group { entries: Values::F32(&entries), width: 2, starts: &[0] };
    let view = BooksView { dim: 2, bits: 2, row_bytes: 1, scale: 1.0, scales: &[], tiled: true, groups: vec![group] };
    let rows = Rows { codes: &[0], ids: Ids::Range { start: 0, len: 1 }, range: 0..1, stream: false };
    (best().lookup_books)(&view, &rows, Output::F32(&mut [0.0; 2]));
}

#[test]
#[should_panic]
fn an_id_outside_is_refused() {
    let entries = [0.0; 8];
    let group = Group { entries: Values::F32(&entries), width: 2, starts: &[0] };
    let view = BooksView { dim: 2, bits: 2, row_bytes: 1, scale: 1.0, scales: &[], tiled: true, groups: vec![group] };
    let rows = Rows { codes: &[0], ids: Ids::I32(&[-1]), range: 0..1, stream: false };
    (best().lookup_books)(&view, &rows, Output::F32(&mut [0.0; 2]));
}

#[test]
fn carries_find_full_exponents() {
    let _fence = Fence::new();
    for kernels in available() {
        for size in 0..70 {
            let words = vec![0x7bff_fbff_u32; size];
            assert_eq!((kernels.carries)(&words, 0x7c00_7c00, 0x0400_0400) & 0x8000_8000, 0, "{}", kernels.name);
            for place in 0..size {
                for bad in [0x7c00_0000, 0x0000_fc01] {
                    let mut words = words.clone();
                    words[place] = bad;
                    assert_ne!(
                        (kernels.carries)(&words, 0x7c00_7c00, 0x0400_0400) & 0x8000_8000,
                        0,
                        "{}",
                        kernels.name
                    );
                }
            }
        }
    }
}

/// Scores of 0 and -0 before a lower one: which of them is the second one must not depend on the width of vectors.
#[test]
fn zeros_of_both_signs_are_one_score() {
    let _fence = Fence::new();
    let mut seen: Option<Vec<u32>> = None;
    for kernels in available() {
        let total = 3usize.next_multiple_of(kernels.block_centers);
        let mut panels = vec![0.0; kernels.panel_rows];
        (kernels.pack)(&[0.0], 1, 1, &[0.0], &mut panels);
        let mut half_norms = vec![f32::INFINITY; total];
        half_norms[..3].copy_from_slice(&[0.0, -0.0, -1.0]);
        let (centers, labels): (Vec<f32>, Vec<u32>) = (vec![1.0; total], (0..total as u32).collect());
        let task = Panels {
            width: 1,
            rows: &panels,
            stride: kernels.panel_rows,
            centers: &centers,
            half_norms: &half_norms,
            labels: &labels,
            next: panels.as_ptr(),
            next_values: 0,
        };
        let rows = kernels.panel_rows;
        let (mut found, mut best, mut second) = (vec![7; rows], vec![1.0; rows], vec![1.0; rows]);
        (kernels.nearest)(&task, &mut found, &mut best, &mut second);
        let bits = vec![found[0], best[0].to_bits(), second[0].to_bits()];
        assert_eq!(*seen.get_or_insert_with(|| bits.clone()), bits, "{}", kernels.name);
    }
}
