//! Every kind of quantizer times every law. A new kind is covered by being in `KINDS`.

use half::{bf16, f16};
use serde_json::{json, Map, Value};
use vqrs_core::decoder::{Decoder, Metric};
use vqrs_core::kernels::{Ids, Output};
use vqrs_core::matrix::{Matrix, Sample};
use vqrs_core::pool::Context;
use vqrs_core::quantizer::{Codec, ErrorSums, KINDS};
use vqrs_core::rng::Rng;
use vqrs_core::table::{About, Mode, Pooling, Table, Verify};
use vqrs_core::tensor::Buffer;
use vqrs_core::{search, stream, Error};

const ROWS: usize = 300;
const DIM: usize = 13;

fn data(rows: usize, dim: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    let means: Vec<f64> = (0..dim).map(|_| rng.normal()).collect();
    (0..rows * dim).map(|i| (means[i % dim] + rng.normal()) as f32).collect()
}

/// Parameter sets worth trying for a kind; a kind that is not named here is tried with its defaults.
fn variants(kind: &str) -> Vec<Value> {
    match kind {
        "additive" => vec![json!({"n_codebooks": 3, "n_bits": 3, "n_rounds": 2})],
        "kmeans" => vec![json!({}), json!({"n_clusters": 5}), json!({"n_clusters": 1, "codebook_dtype": "bfloat16"})],
        "product" => vec![json!({}), json!({"n_subvectors": 5, "n_bits": 3}), json!({"codebook_dtype": "float32"})],
        "product-residual" => vec![json!({"n_subvectors": 3, "n_bits": 3})],
        "tree" => vec![json!({"branching": 4, "beam_width": 2})],
        "residual" => vec![json!({"n_stages": 3}), json!({"n_stages": 2, "n_bits": 3, "beam_width": 1})],
        "scalar" => {
            let mut all = Vec::new();
            for dtype in ["float16", "bfloat16", "int8", "int4", "int2"] {
                for granularity in ["row", "column", "block"] {
                    for symmetric in [false, true] {
                        let size = 4;
                        let rules = json!({"dtype": dtype, "granularity": granularity, "block_size": size, "symmetric": symmetric});
                        all.push(rules);
                    }
                }
            }
            all
        }
        _ => vec![json!({})],
    }
}

fn each(law: impl Fn(&str, Map<String, Value>)) {
    for kind in KINDS {
        for variant in variants(kind.name) {
            let Value::Object(parameters) = variant else { unreachable!() };
            law(kind.name, parameters);
        }
    }
}

fn fit(kind: &str, parameters: &Map<String, Value>, x: &[f32], threads: i64) -> (Codec, Vec<u8>) {
    let sample = Sample::new(Matrix::new(x, DIM).unwrap(), None, &Context::default()).unwrap();
    Codec::fit(kind, parameters.clone(), sample, false, &Context::new(Some(threads), 7)).unwrap()
}

fn table(codec: &Codec, codes: &[u8]) -> Table {
    let mut about = About { kind: codec.kind().into(), parameters: codec.parameters(), ..Default::default() };
    about.errors.insert("relative".into(), 0.25.into());
    let rows = codes.len() / codec.decoder().row_bytes();
    Table::new(codec.decoder().clone(), Buffer::copy_of(codes).unwrap(), rows, about).unwrap()
}

fn bytes_of(decoder: &Decoder) -> Vec<u8> {
    decoder.tensors().iter().flat_map(|t| t.data.bytes().to_vec()).collect()
}

#[test]
fn the_same_seed_gives_the_same_bytes_for_any_number_of_threads() {
    let x = data(ROWS, DIM, 1);
    each(|kind, parameters| {
        let (codec, codes) = fit(kind, &parameters, &x, 1);
        for threads in [2, 3] {
            let (other, other_codes) = fit(kind, &parameters, &x, threads);
            assert_eq!(codes, other_codes, "{kind} {parameters:?}");
            assert_eq!(bytes_of(codec.decoder()), bytes_of(other.decoder()), "{kind} {parameters:?}");
        }
    });
}

#[test]
fn rows_are_encoded_alike_alone_and_together_and_better_than_the_mean() {
    let x = data(ROWS, DIM, 2);
    let rows = Matrix::new(&x, DIM).unwrap();
    let ctx = Context::default();
    each(|kind, parameters| {
        let (codec, codes) = fit(kind, &parameters, &x, 2);
        for row in [0, 1, 17, ROWS - 1] {
            let alone = codec.encode(rows.block(row..row + 1), &ctx).unwrap();
            assert_eq!(alone, codes[row * alone.len()..][..alone.len()], "{kind} {parameters:?}");
        }
        let mut sums = ErrorSums::default();
        sums.add(rows, &codes, None, codec.decoder(), &ctx).unwrap();
        let centred = sums.finish(false)["centred"].as_f64().unwrap();
        assert!(centred < 1.001, "{kind} {parameters:?}: {centred}");
    });
}

#[test]
fn lookup_is_decode_and_pool_is_a_sum() {
    let x = data(ROWS, DIM, 3);
    let ctx = Context::default();
    each(|kind, parameters| {
        let (codec, codes) = fit(kind, &parameters, &x, 1);
        let (table, all) = (table(&codec, &codes), codec.decode(&codes, &ctx).unwrap());
        let ids = [5i64, 0, 299, 5, 120];
        let mut out = vec![0f32; ids.len() * DIM];
        table.lookup(Ids::I64(&ids), &mut out, &ctx).unwrap();
        let mut halves = vec![0u16; out.len()];
        table.lookup(Ids::I64(&ids), Output::F16(&mut halves), &ctx).unwrap();
        assert!(out.iter().zip(&halves).all(|(value, half)| f16::from_f32(*value).to_bits() == *half), "{kind}");
        table.lookup(Ids::I64(&ids), Output::Bf16(&mut halves), &ctx).unwrap();
        assert!(out.iter().zip(&halves).all(|(value, half)| bf16::from_f32(*value).to_bits() == *half), "{kind}");
        for (row, id) in out.chunks(DIM).zip(ids) {
            assert_eq!(row, &all[id as usize * DIM..][..DIM], "{kind} {parameters:?}");
        }
        let mut pooled = vec![0f32; 3 * DIM];
        table.pool(Ids::I64(&ids), &[0, 2, 2], None, Pooling::Sum, &mut pooled, &ctx).unwrap();
        for column in 0..DIM {
            assert_eq!(pooled[column], out[column] + out[DIM + column]);
            assert_eq!(pooled[DIM + column], 0.0);
            let sum = out[2 * DIM + column] + out[3 * DIM + column] + out[4 * DIM + column];
            assert_eq!(pooled[2 * DIM + column], sum);
        }
    });
}

#[test]
fn search_finds_the_best_rows_of_the_decoded_table() {
    let x = data(ROWS, DIM, 4);
    let queries = data(3, DIM, 5);
    let ctx = Context::default();
    each(|kind, parameters| {
        let (codec, codes) = fit(kind, &parameters, &x, 1);
        let (table, all) = (table(&codec, &codes), codec.decode(&codes, &ctx).unwrap());
        for metric in [Metric::InnerProduct, Metric::L2, Metric::Cosine] {
            let found = search::search(&table, Matrix::new(&queries, DIM).unwrap(), 4, metric, &ctx).unwrap();
            for (query, (scores, ids)) in queries.chunks(DIM).zip(found.0.chunks(4).zip(found.1.chunks(4))) {
                let score = |row: &[f32]| -> f64 {
                    let dot =
                        |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                    match metric {
                        Metric::InnerProduct => dot(query, row),
                        Metric::L2 => query.iter().zip(row).map(|(a, b)| f64::from(a - b).powi(2)).sum(),
                        Metric::Cosine => dot(query, row) / (dot(query, query) * dot(row, row)).sqrt(),
                    }
                };
                let mut exact: Vec<f64> = all.chunks(DIM).map(score).collect();
                for (place, id) in ids.iter().enumerate() {
                    let mine = exact[*id as usize];
                    assert!((mine - f64::from(scores[place])).abs() < 1e-4, "{kind} {parameters:?} {metric:?}");
                }
                exact.sort_by(f64::total_cmp);
                if metric != Metric::L2 {
                    exact.reverse();
                }
                for (score, exact) in scores.iter().zip(exact) {
                    assert!((f64::from(*score) - exact).abs() < 1e-4, "{kind} {parameters:?} {metric:?}");
                }
            }
        }
    });
}

#[test]
fn saved_and_opened_is_the_same_table_of_the_estimated_size() {
    let x = data(ROWS, DIM, 6);
    let ctx = Context::default();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table.safetensors");
    each(|kind, parameters| {
        let (codec, codes) = fit(kind, &parameters, &x, 1);
        let table = table(&codec, &codes);
        let bytes = table.save(&path, false, &ctx).unwrap();
        assert_eq!(bytes, std::fs::metadata(&path).unwrap().len());
        assert_eq!(bytes, table.nbytes().unwrap());
        assert_eq!(bytes, stream::estimate(kind, parameters.clone(), ROWS, DIM).unwrap(), "{kind} {parameters:?}");
        for (verify, mode) in [(Verify::Header, Mode::Mmap), (Verify::Lazy, Mode::Mmap), (Verify::Full, Mode::Read)] {
            let opened = Table::open(&path, verify, mode).unwrap();
            assert_eq!(opened.codes(), table.codes());
            assert_eq!(bytes_of(opened.decoder()), bytes_of(table.decoder()));
            assert_eq!(opened.about(), table.about());
            opened.verify(&ctx).unwrap();
            let mut out = vec![0f32; DIM];
            opened.lookup(Ids::I32(&[42]), &mut out, &ctx).unwrap();
            assert_eq!(out, codec.decode(&codes, &ctx).unwrap()[42 * DIM..43 * DIM]);
        }
        // Streaming in blocks writes the same file but for the errors it measures.
        let streamed = folder.path().join("streamed.safetensors");
        let mut writer =
            stream::TableWriter::create(&streamed, codec.clone(), None, Default::default(), false).unwrap();
        for block in [0..1, 1..100, 100..ROWS] {
            writer.write(Matrix::new(&x, DIM).unwrap().block(block), None, &ctx).unwrap();
        }
        assert_eq!(writer.finish(Map::new()).unwrap(), bytes);
        assert_eq!(Table::open(&streamed, Verify::Full, Mode::Mmap).unwrap().codes(), table.codes());
    });
}

#[test]
fn powers_of_two_scale_the_output_exactly() {
    let x = data(ROWS, DIM, 8);
    let ctx = Context::default();
    each(|kind, parameters| {
        // Plain casts have the range of their type.
        if parameters.get("dtype").is_some_and(|d| d == "float16") {
            return;
        }
        let (codec, codes) = fit(kind, &parameters, &x, 1);
        let decoded = codec.decode(&codes, &ctx).unwrap();
        for factor in [2f32.powi(-20), 2f32.powi(14)] {
            let scaled: Vec<f32> = x.iter().map(|v| v * factor).collect();
            let (codec, codes) = fit(kind, &parameters, &scaled, 1);
            let wanted: Vec<f32> = decoded.iter().map(|v| v * factor).collect();
            assert_eq!(codec.decode(&codes, &ctx).unwrap(), wanted, "{kind} {parameters:?} {factor}");
        }
    });
}

#[test]
fn odd_tables_are_defined() {
    let ctx = Context::default();
    let tables: Vec<(usize, Vec<f32>)> = vec![
        (1, vec![3.0]),
        (1, vec![0.0; 7]),
        (5, vec![-1.5; 5]),
        (5, data(1, 5, 1)),
        (2, (0..40).map(|i| (i % 4) as f32).collect()),
        (3, vec![1e-40; 30]),
        (3, vec![1e15; 30]),
        (4, vec![f32::MIN_POSITIVE; 16]),
    ];
    each(|kind, parameters| {
        for (dim, x) in &tables {
            let rows = Matrix::new(x, *dim).unwrap();
            let fitted =
                Codec::fit(kind, parameters.clone(), Sample::new(rows, None, &Context::default()).unwrap(), true, &ctx);
            let big = x.iter().any(|v| *v > 65504.0) && parameters.get("dtype").is_some_and(|d| d == "float16");
            match fitted {
                Ok((codec, codes)) => {
                    let decoded = codec.decode(&codes, &ctx).unwrap();
                    assert!(decoded.iter().all(|v| v.is_finite()), "{kind} {parameters:?} {x:?} {decoded:?}");
                    let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
                    let off = decoded.iter().zip(x).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
                    assert!(off <= largest * 2.0, "{kind} {parameters:?} {x:?} {decoded:?}");
                }
                Err(error) => {
                    assert!(big && matches!(error, Error::OutOfRange { .. }), "{kind} {parameters:?}: {error}")
                }
            }
        }
        for bad in [f32::NAN, f32::INFINITY, 1e16] {
            let x = [1.0, 2.0, 3.0, bad];
            assert!(Sample::new(Matrix::new(&x, 2).unwrap(), None, &Context::default()).is_err());
        }
    });
}

#[test]
fn unknown_kinds_and_parameters_are_named() {
    let ctx = Context::default();
    let sample = || Sample::new(Matrix::new(&[1.0, 2.0], 1).unwrap(), None, &Context::default()).unwrap();
    let text = |kind: &str, parameters: Value| {
        let Value::Object(parameters) = parameters else { unreachable!() };
        Codec::fit(kind, parameters, sample(), false, &ctx).err().expect("refused").to_string()
    };
    let known: Vec<&str> = KINDS.iter().map(|kind| kind.name).collect();
    assert!(text("produkt", json!({})).contains(&known.join(", ")));
    assert!(text("product", json!({"n_bitz": 8})).starts_with("n_bitz=8 is not allowed: product takes"));
    assert!(text("product", json!({"n_bits": 17})).contains("must be from 1 to 16"));
    assert!(text("product", json!({"n_bits": "8"})).starts_with("n_bits=\"8\" is not allowed"));
    assert!(text("scalar", json!({"dtype": "int7"})).contains("int4"));
    assert!(text("kmeans", json!({"tol": -1.0})).contains("0 or more"));
}
