//! Kernels through the public doors of the core, on one thread: `cargo bench -p vqrs-core [-- FILTER]`.
//!
//! The fastest path of the processor runs, or the one that `VQRS_SIMD` names; its name is the first word of each
//! result. Ids are drawn anew for each measurement, outside the clock. Where a throughput is in elements, they are rows
//! of a lookup, ids of a pool, and floating point operations elsewhere: `fma_peak` is what the processor can do.

use criterion::measurement::WallTime;
use criterion::{criterion_group, criterion_main, BatchSize, BenchmarkGroup, Criterion, Throughput};
use std::hint::black_box;
use std::time::Duration;
use vqrs_core::algo::nearest::{Centroids, Columns};
use vqrs_core::decoder::{Books, CodebookDtype, Decoder, Granularity, GroupSpec, Levels, LevelsSpec, Number};
use vqrs_core::kernels::{self, Ids, PEAK_FMAS};
use vqrs_core::pool::Context;
use vqrs_core::rng::Rng;
use vqrs_core::table::{About, Mode, Pooling, Table, Verify};
use vqrs_core::tensor::Buffer;

/// Rows of every table: more than the caches hold, decoded.
const ROWS: usize = 1_000_000;

/// Ids of a lookup.
const BATCH: usize = 65_536;

/// Ids of a bag.
const BAG: usize = 20;

fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(format!("{} {name}", kernels::best().name));
    group.sample_size(20).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(800));
    group
}

fn normal(rng: &mut Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.normal() as f32).collect()
}

/// Random codes over a decoder.
fn table(decoder: Decoder, rows: usize) -> Table {
    let mut rng = Rng::new(1);
    let bytes = rows * decoder.row_bytes();
    let codes: Vec<u8> = (0..bytes.div_ceil(8)).flat_map(|_| rng.next_u64().to_le_bytes()).take(bytes).collect();
    Table::new(decoder, Buffer::copy_of(&codes).unwrap(), rows, About::default()).expect("whole rows")
}

/// Books of 256 entries: side by side where they fill the row exactly, else on top of each other.
fn books(dim: usize, count: usize, width: usize, dtype: CodebookDtype) -> Decoder {
    let step = if count * width == dim { width } else { 0 };
    let spec = GroupSpec { width, entries: 256, starts: (0..count).map(|m| m * step).collect() };
    let values = normal(&mut Rng::new(2), count * 256 * width);
    Decoder::Books(Books::new(dim, 8, dtype, vec![(spec, values)]).expect("books"))
}

fn levels(dim: usize, dtype: Number, granularity: Granularity) -> Decoder {
    let spec = LevelsSpec {
        dim,
        dtype,
        granularity,
        block_size: 32,
        symmetric: false,
        scale_dtype: Default::default(),
        scale_factor: 1.0,
        offset_factor: 1.0,
    };
    Decoder::Levels(Levels::new(spec, None).expect("levels"))
}

fn lookup(criterion: &mut Criterion) {
    use CodebookDtype::{Bfloat16, Float16, Float32};
    let mut group = group(criterion, "lookup");
    group.throughput(Throughput::Elements(BATCH as u64));
    let mut run = |name: &str, decoder: Decoder| {
        let (table, mut rng, ctx) = (table(decoder, ROWS), Rng::new(3), Context::new(Some(1), 0));
        let mut out = vec![0f32; BATCH * table.dim()];
        group.bench_function(name, |bencher| {
            let draw = || (0..BATCH).map(|_| rng.below(ROWS) as i64).collect::<Vec<_>>();
            let lookup = |ids: Vec<i64>| table.lookup(Ids::I64(&ids), &mut out, &ctx).expect("rows");
            bencher.iter_batched(draw, lookup, BatchSize::LargeInput);
        });
    };
    for (dim, count, width) in [(64, 32, 2), (64, 16, 4), (64, 8, 8), (128, 16, 8), (128, 8, 16), (384, 48, 8)] {
        run(&format!("product d={dim} M={count} width {width}"), books(dim, count, width, Float16));
    }
    run("product d=64 M=8 float32", books(64, 8, 8, Float32));
    for count in [4, 8] {
        run(&format!("residual d=64 M={count} bfloat16"), books(64, count, 64, Bfloat16));
        run(&format!("residual d=64 M={count} float16"), books(64, count, 64, Float16));
    }
    for (name, dtype) in [("int8", Number::Int8), ("int4", Number::Int4), ("int2", Number::Int2)] {
        run(&format!("{name} by row d=64"), levels(64, dtype, Granularity::Row));
    }
    run("int4 by block d=64", levels(64, Number::Int4, Granularity::Block));
    run("float16 d=64", levels(64, Number::Float16, Granularity::Row));
    group.finish();
}

fn pool(criterion: &mut Criterion) {
    let mut group = group(criterion, "pool");
    let bags = BATCH / BAG;
    group.throughput(Throughput::Elements((bags * BAG) as u64));
    let offsets: Vec<i64> = (0..bags).map(|bag| (bag * BAG) as i64).collect();
    for (name, decoder) in [
        ("product d=64 M=8", books(64, 8, 8, CodebookDtype::Float16)),
        ("product d=64 M=16", books(64, 16, 4, CodebookDtype::Float16)),
        ("int8 by row d=64", levels(64, Number::Int8, Granularity::Row)),
        ("int4 by row d=64", levels(64, Number::Int4, Granularity::Row)),
    ] {
        let (table, mut rng, ctx) = (table(decoder, ROWS), Rng::new(3), Context::new(Some(1), 0));
        let mut out = vec![0f32; bags * table.dim()];
        group.bench_function(name, |bencher| {
            let draw = || (0..bags * BAG).map(|_| rng.below(ROWS) as i64).collect::<Vec<_>>();
            let pool = |ids: Vec<i64>| table.pool(Ids::I64(&ids), &offsets, None, Pooling::Sum, &mut out, &ctx);
            bencher.iter_batched(draw, pool, BatchSize::LargeInput);
        });
    }
    group.finish();
}

/// Rows, centres and columns of the assignments.
const SHAPES: [(usize, usize, usize); 8] = [
    (32_768, 256, 64),
    (8_192, 1_024, 128),
    (65_536, 256, 16),
    (1_024, 4_096, 384),
    (65_536, 256, 1),
    (65_536, 256, 2),
    (65_536, 256, 4),
    (65_536, 256, 8),
];

fn nearest(criterion: &mut Criterion) {
    let mut group = group(criterion, "nearest");
    let rounds = 4_000;
    group.throughput(Throughput::Elements((2 * rounds * PEAK_FMAS) as u64));
    group.bench_function("fma_peak", |bencher| bencher.iter(|| (kernels::best().fma_peak)(black_box(rounds))));
    for (rows, count, width) in SHAPES {
        let (mut rng, ctx) = (Rng::new(4), Context::new(Some(1), 0));
        let (x, centers) = (normal(&mut rng, rows * width), normal(&mut rng, count * width));
        let (x, centroids, mut labels) =
            (Columns::contiguous(&x, width), Centroids::new(&centers, width), vec![0; rows]);
        group.throughput(Throughput::Elements((2 * rows * count * width) as u64));
        let name = format!("k={count} d={width}");
        group.bench_function(&name, |bencher| bencher.iter(|| centroids.nearest(x, &mut labels, None, &ctx)));
        let name = format!("exact k={count} d={width}");
        group.bench_function(&name, |bencher| bencher.iter(|| centroids.nearest_exact(x, &mut labels, None, &ctx)));
    }
    group.finish();
}

fn products(criterion: &mut Criterion) {
    let mut group = group(criterion, "products");
    for (rows, count, width) in [(24, 2_048, 64), (24, 256, 8), (1, 2_048, 64)] {
        let mut rng = Rng::new(5);
        let (x, centers) = (normal(&mut rng, rows * width), normal(&mut rng, count * width));
        let (x, centroids) = (Columns::contiguous(&x, width), Centroids::new(&centers, width));
        let mut out = vec![0f32; rows * count];
        group.throughput(Throughput::Elements((2 * rows * count * width) as u64));
        let name = |what: &str| format!("{what} {rows} x {count} d={width}");
        group.bench_function(name("dots"), |bencher| bencher.iter(|| centroids.dots_block(x, &mut out)));
        group.bench_function(name("distances"), |bencher| bencher.iter(|| centroids.distances_block(x, &mut out)));
    }
    group.finish();
}

fn pack(criterion: &mut Criterion) {
    let mut group = group(criterion, "pack");
    let kernels = kernels::best();
    for width in [4, 16, 64, 384] {
        let rows = 64usize.next_multiple_of(kernels.panel_rows);
        let x = normal(&mut Rng::new(6), rows * width);
        let (shift, mut out) = (vec![0.5; width], vec![0f32; rows * width]);
        group.throughput(Throughput::Bytes((4 * rows * width) as u64));
        let name = format!("{rows} rows d={width}");
        group.bench_function(name, |bencher| bencher.iter(|| (kernels.pack)(&x, width, rows, &shift, &mut out)));
    }
    group.finish();
}

fn open(criterion: &mut Criterion) {
    let mut group = group(criterion, "open");
    let (folder, ctx) = (tempfile::tempdir().expect("a folder"), Context::new(Some(1), 0));
    for rows in [1_000, ROWS] {
        let path = folder.path().join(format!("{rows}.safetensors"));
        table(books(64, 8, 8, CodebookDtype::Float16), rows).save(&path, false, &ctx).expect("a file");
        let mut row = vec![0f32; 64];
        group.bench_function(format!("{rows} rows and the first"), |bencher| {
            bencher.iter(|| {
                let table = Table::open(&path, Verify::Header, Mode::Mmap).expect("a table");
                table.lookup(Ids::Range { start: 0, len: 1 }, &mut row, &ctx).expect("a row");
            });
        });
    }
    group.finish();
}

criterion_group!(benches, lookup, pool, nearest, products, pack, open);
criterion_main!(benches);
