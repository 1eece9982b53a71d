//! The crate's own threads, and the context of a long call.
//!
//! Pools are made on first use, one per size, and kept. A forked child sees that its process number differs and makes
//! its own: the parent's threads do not exist there.

use crate::error::{Error, Result};
use rayon::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

struct Pool {
    process: u32,
    threads: usize,
    pool: rayon::ThreadPool,
}

/// Every pool that was made. Slots are filled once, in order, and never emptied; reading them takes no lock, because a
/// lock could be held by another thread at the moment of a fork.
static POOLS: [OnceLock<Pool>; 128] = [const { OnceLock::new() }; 128];

/// More threads than any machine's cores only take time to start.
const MAX_THREADS: usize = 256;

/// The cores that this process may use, in the low half, and the process that counted them: counting reads files, which
/// takes as long as the lookup of a thousand rows.
static CORES: AtomicU64 = AtomicU64::new(0);

fn cores() -> usize {
    let process = u64::from(std::process::id()) << 32;
    let known = CORES.load(Ordering::Relaxed);
    if known != 0 && known & !u64::from(u32::MAX) == process {
        return known as u32 as usize;
    }
    let count = std::thread::available_parallelism().map_or(1, |n| n.get());
    CORES.store(process | count as u64, Ordering::Relaxed);
    count
}

/// How many threads a call may use: `n_jobs` as scikit-learn reads it (-1: all, -2: all but one), else
/// `VQRS_NUM_THREADS`, `RAYON_NUM_THREADS`, or the cores that this process may use (affinity and cgroup).
pub fn threads(n_jobs: Option<i64>) -> usize {
    let from_env =
        |name: &str| std::env::var(name).ok().and_then(|v| v.trim().parse::<usize>().ok()).filter(|n| *n > 0);
    match n_jobs {
        Some(n) if n > 0 => n as usize,
        Some(n) if n < 0 => (cores() as i64 + 1 + n).max(1) as usize,
        _ => from_env("VQRS_NUM_THREADS").or_else(|| from_env("RAYON_NUM_THREADS")).unwrap_or_else(cores),
    }
    .min(MAX_THREADS)
}

fn pool(threads: usize) -> &'static rayon::ThreadPool {
    let process = std::process::id();
    let fits = |entry: &&Pool| entry.process == process && entry.threads == threads;
    let mine = || POOLS.iter().map_while(|slot| slot.get());
    if let Some(entry) = mine().find(fits) {
        return &entry.pool;
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("vqrs-{i}"))
        .build()
        .expect("the system starts a thread");
    let mut entry = Pool { process, threads, pool };
    for slot in &POOLS {
        match slot.set(entry) {
            Ok(()) => break,
            Err(back) => entry = back,
        }
    }
    // With every slot taken (128 sizes and forks on the way to here), share a pool of another size.
    let made = || mine().filter(|entry| entry.process == process);
    &mine().find(fits).or_else(|| made().next()).expect("a forked child keeps a slot for its own pool").pool
}

/// How far a long call has come; read by another thread.
#[derive(Debug, Default)]
pub struct Progress {
    stage: Mutex<&'static str>,
    done: AtomicU64,
    total: AtomicU64,
}

impl Progress {
    /// The stage's name, the work done and the work in all.
    pub fn read(&self) -> (&'static str, u64, u64) {
        let stage = *self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        (stage, self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }
}

/// What every long call carries: threads, seed, the wish to stop, and progress.
#[derive(Clone, Debug)]
pub struct Context {
    n_jobs: Option<i64>,
    /// Found when first asked for: counting the cores takes longer than a small lookup.
    threads: OnceLock<usize>,
    /// Seed of everything random.
    pub seed: u64,
    shared: Arc<Shared>,
}

/// What a context has in common with its copies.
#[derive(Debug, Default)]
struct Shared {
    cancelled: AtomicBool,
    progress: Progress,
}

impl Default for Context {
    fn default() -> Self {
        Context::new(None, 0)
    }
}

impl Context {
    /// A context with `n_jobs` threads (see [`threads`]) and a seed.
    pub fn new(n_jobs: Option<i64>, seed: u64) -> Self {
        Context { n_jobs, threads: OnceLock::new(), seed, shared: Arc::default() }
    }

    /// Threads that this call may use.
    pub fn threads(&self) -> usize {
        *self.threads.get_or_init(|| threads(self.n_jobs))
    }

    /// The same context with no more threads than these.
    pub fn at_most(self, threads: usize) -> Self {
        let fewer = if threads <= 1 { 1 } else { threads.min(self.threads()) };
        Context { threads: fewer.into(), ..self }
    }

    /// The same context with another seed (progress and cancellation stay shared).
    pub fn with_seed(&self, seed: u64) -> Self {
        Context { seed, ..self.clone() }
    }

    /// The same context for work that stays on the calling thread.
    pub fn serial(&self) -> Self {
        Context { n_jobs: Some(1), threads: OnceLock::new(), ..self.clone() }
    }

    /// Asks the call to stop; it returns [`Error::Interrupted`] at its next check.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
    }

    /// Fails once [`Context::cancel`] was called. Cheap: call it once a block of rows.
    pub fn check(&self) -> Result<()> {
        if self.shared.cancelled.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        Ok(())
    }

    /// Where progress can be read.
    pub fn progress(&self) -> &Progress {
        &self.shared.progress
    }

    /// Starts a stage of `total` units of work.
    pub fn stage(&self, name: &'static str, total: u64) {
        *self.progress().stage.lock().unwrap_or_else(PoisonError::into_inner) = name;
        self.progress().done.store(0, Ordering::Relaxed);
        self.progress().total.store(total, Ordering::Relaxed);
    }

    /// Counts work as done.
    pub fn advance(&self, units: u64) {
        self.progress().done.fetch_add(units, Ordering::Relaxed);
    }

    /// Runs `work` inside the pool, so that parallel iterators in it use this context's threads.
    pub fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        pool(self.threads()).install(work)
    }

    /// Runs `work(index, chunk)` over chunks of `size` values of `out`, in parallel and stopping early when cancelled.
    /// Chunk borders depend on `size` alone, so results do not depend on the number of threads.
    pub fn chunks<T: Send>(
        &self,
        out: &mut [T],
        size: usize,
        work: impl Fn(usize, &mut [T]) -> Result<()> + Sync,
    ) -> Result<()> {
        let run = |(index, chunk): (usize, &mut [T])| self.check().and_then(|()| work(index, chunk));
        if out.len() <= size || self.threads() == 1 {
            return out.chunks_mut(size).enumerate().try_for_each(run);
        }
        self.install(|| out.par_chunks_mut(size).enumerate().try_for_each(run))
    }

    /// `work(task)` for all tasks, in parallel and stopping early when cancelled. The calling thread works as well: the
    /// others take as long to wake as a thousand rows to decode.
    pub fn each<T: Send>(&self, tasks: Vec<T>, work: impl Fn(T) -> Result<()> + Sync) -> Result<()> {
        let run = |task: T| self.check().and_then(|()| work(task));
        let threads = self.threads().min(tasks.len());
        if threads <= 1 {
            return tasks.into_iter().try_for_each(run);
        }
        let tasks = Mutex::new(tasks.into_iter());
        let failure = Mutex::new(None);
        let next = || tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
        let drain = || {
            while let Some(task) = next() {
                if let Err(error) = run(task) {
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    while next().is_some() {}
                }
            }
        };
        pool(self.threads()).in_place_scope(|scope| {
            for _ in 1..threads {
                scope.spawn(|_| drain());
            }
            drain();
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// `work(0), ..., work(count - 1)` in parallel, results in order.
    pub fn map<T: Send>(&self, count: usize, work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
        let run = |index: usize| self.check().and_then(|()| work(index));
        if count <= 1 || self.threads() == 1 {
            return (0..count).map(run).collect();
        }
        self.install(|| (0..count).into_par_iter().map(run).collect())
    }
}
