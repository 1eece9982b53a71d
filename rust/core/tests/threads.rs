//! Many threads on the same tables: for the thread sanitizer above all, and every answer is compared.

use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use vqrs_core::decoder::Metric;
use vqrs_core::error::Error;
use vqrs_core::kernels::Ids;
use vqrs_core::matrix::Matrix;
use vqrs_core::pool::Context;
use vqrs_core::quantizer::Codec;
use vqrs_core::rng::Rng;
use vqrs_core::search;
use vqrs_core::table::{Mode, Pooling, Table, Verify};

const DIM: usize = 5;

/// A file and what is true of it.
struct Subject {
    path: PathBuf,
    rows: Vec<f32>,
    found: (Vec<f32>, Vec<i64>),
    /// The table that all threads read now, as the Python class holds it; none once it was closed.
    open: RwLock<Option<Arc<Table>>>,
}

impl Subject {
    /// A copy of a golden file, so that it can be replaced.
    fn new(folder: &Path, golden: &Path) -> Self {
        let path = folder.join(golden.file_name().unwrap());
        std::fs::copy(golden, &path).unwrap();
        let table = Table::open(&path, Verify::Lazy, Mode::Mmap).unwrap();
        assert_eq!(table.dim(), DIM);
        let mut rows = vec![0.0; table.rows() * DIM];
        table.lookup(Ids::Range { start: 0, len: table.rows() }, &mut rows, &Context::new(Some(1), 0)).unwrap();
        let found = best(&table, &rows).unwrap();
        Subject { path, rows, found, open: RwLock::new(Some(Arc::new(table))) }
    }
}

fn golden() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    paths.sort();
    assert!(paths.len() > 10, "the golden files are gone");
    paths
}

fn best(table: &Table, rows: &[f32]) -> vqrs_core::Result<(Vec<f32>, Vec<i64>)> {
    let query = Matrix::new(&rows[..DIM], DIM)?;
    search::search(table, query, 3, Metric::InnerProduct, &Context::new(Some(2), 0))
}

/// One call of one thread.
fn call(subject: &Subject, rng: &mut Rng, mine: &Path) -> vqrs_core::Result<()> {
    let n = subject.rows.len() / DIM;
    let table = subject.open.read().unwrap().clone().ok_or(Error::Closed)?;
    let ids: Vec<i64> = (0..[1, 20, 60_000][rng.below(3)]).map(|_| rng.below(n) as i64).collect();
    let row = |id: i64| &subject.rows[id as usize * DIM..][..DIM];
    let ctx = Context::new(Some(1 + rng.below(3) as i64), 0);
    match rng.below(9) {
        0..3 => {
            let mut out = vec![f32::NAN; ids.len() * DIM];
            table.lookup(Ids::I64(&ids), &mut out, &ctx)?;
            assert!(out.chunks(DIM).zip(&ids).all(|(got, id)| got == row(*id)), "other rows");
        }
        3 => {
            let mut out = vec![f32::NAN; DIM];
            table.pool(Ids::I64(&ids), &[0], None, Pooling::Sum, &mut out, &ctx)?;
            let sum = |t: usize| ids.iter().fold(0.0, |sum, id| sum + row(*id)[t]);
            assert!((0..DIM).all(|t| out[t] == sum(t)), "another sum");
        }
        4 => assert_eq!(best(&table, &subject.rows)?, subject.found),
        5 => {
            let names = table.names()?.unwrap();
            assert_eq!(table.find(&names[n - 1])?, Some(n - 1));
            table.verify(&ctx)?;
        }
        6 => {
            table.save(mine, false, &ctx)?;
            assert_eq!(std::fs::read(mine).unwrap(), std::fs::read(&subject.path).unwrap());
        }
        7 => {
            table.save(&subject.path, false, &ctx)?;
        }
        _ => {
            let verify = [Verify::Header, Verify::Lazy, Verify::Full][rng.below(3)];
            let mode = [Mode::Mmap, Mode::Read][rng.below(2)];
            // Closed for a moment, then replaced.
            *subject.open.write().unwrap() = None;
            let fresh = Arc::new(Table::open(&subject.path, verify, mode)?);
            *subject.open.write().unwrap() = Some(fresh);
        }
    }
    Ok(())
}

#[test]
fn everything_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let subjects: Vec<Subject> = golden().iter().map(|path| Subject::new(folder.path(), path)).collect();
    std::thread::scope(|scope| {
        for number in 0..16 {
            let (subjects, folder) = (&subjects, &folder);
            scope.spawn(move || {
                let rng = &mut Rng::new(number);
                let mine = folder.path().join(format!("mine-{number}"));
                for _ in 0..60 {
                    match call(&subjects[rng.below(subjects.len())], rng, &mine) {
                        Ok(()) | Err(Error::Closed) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
}

/// Codecs that all threads encode with, and pools of several sizes that are made at once.
#[test]
fn encoding_at_once() {
    let mut encoded = 0;
    for path in golden() {
        let table = Table::open(&path, Verify::Full, Mode::Read).unwrap();
        let (about, decoder) = (table.about(), table.decoder().clone());
        let Ok(codec) = Codec::new(&about.kind, about.parameters.clone(), decoder) else { continue };
        let mut rng = Rng::new(1);
        let x: Vec<f32> = (0..3000 * DIM).map(|_| rng.normal() as f32).collect();
        let encode = |threads| codec.encode(Matrix::new(&x, DIM).unwrap(), &Context::new(Some(threads), 0)).unwrap();
        let codes = encode(1);
        std::thread::scope(|scope| {
            for threads in 1..=8 {
                let (encode, codes) = (&encode, &codes);
                scope.spawn(move || assert_eq!(&encode(threads), codes, "{threads} threads"));
            }
        });
        encoded += 1;
    }
    assert!(encoded > 10);
}
