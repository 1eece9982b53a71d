//! The crate's own threads, and the context of a long call.
//!
//! Pools are made on first use, one per size, and kept. A forked child is told that it is one ([`forked`]), and sees
//! that its process number differs, and makes its own: the parent's threads do not exist there.

use crate::error::{Error, Result};
use rayon::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

/// A pool, and the next one in the list.
struct Pool {
    process: (u32, usize),
    /// Threads that were asked for; the system may have started fewer.
    threads: usize,
    pool: rayon::ThreadPool,
    next: Next,
}

type Next = OnceLock<Box<Pool>>;

/// Forks between the first process and this one.
static FORKS: AtomicUsize = AtomicUsize::new(0);

/// Lists of the pools that were made, which only grow. Reading one takes no lock, because a lock could be held by another
/// thread at the moment of a fork; and a child adds to a list of its own, because the end of its parent's may be just
/// changing. Descendants this many forks away share a list and tell their pools by the process.
static POOLS: [Next; 64] = [const { OnceLock::new() }; 64];

/// To be called in a forked child.
pub fn forked() {
    FORKS.fetch_add(1, Ordering::SeqCst);
}

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

/// The pool of so many threads; `None` where the system starts not even one.
fn pool(threads: usize) -> Option<&'static rayon::ThreadPool> {
    let forks = FORKS.load(Ordering::SeqCst);
    let process = (std::process::id(), forks);
    let first = &POOLS[forks % POOLS.len()];
    let find = || {
        std::iter::successors(first.get(), |entry| entry.next.get())
            .find(|entry| entry.process == process && entry.threads == threads)
    };
    if let Some(entry) = find() {
        return Some(&entry.pool);
    }
    // What the system refuses now it may grant another process later: fewer threads do the same work.
    let sizes = std::iter::successors(Some(threads), |n| (*n > 1).then_some(n / 2));
    let pool = sizes.flat_map(start).next()?;
    let mut entry = Box::new(Pool { process, threads, pool, next: OnceLock::new() });
    let mut last = first;
    loop {
        // Another thread may have been faster; its pool serves both.
        if let Some(made) = find() {
            return Some(&made.pool);
        }
        match last.set(entry) {
            Ok(()) => return find().map(|entry| &entry.pool),
            Err(back) => entry = back,
        }
        last = &last.get()?.next;
    }
}

fn start(threads: usize) -> Option<rayon::ThreadPool> {
    // A thread that finds no place for its stack ends the process, and each takes a heap of its own. Addresses are asked
    // for, not memory.
    #[cfg(unix)]
    const THREAD: usize = 68 << 20;
    #[cfg(unix)]
    memmap2::MmapOptions::new().len(threads.checked_mul(THREAD)?).no_reserve_swap().map_anon().ok()?;
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("vqrs-{i}"));
    builder.build().ok()
}

/// Runs `work` on the calling thread alone, where the system starts no other.
fn alone<R>(work: impl FnOnce() -> R) -> R {
    // Parallel iterators need a pool: one whose only thread is this one. A thread that is in one already stays there.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build();
    let found = work();
    drop(pool);
    found
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
    watch: Option<Watch>,
    shared: Arc<Shared>,
}

/// How often a watch asks.
const WATCHED: Duration = Duration::from_millis(50);

/// Who tells, on one thread, whether a call is to stop.
#[derive(Clone, Debug)]
struct Watch {
    stop: fn() -> bool,
    thread: ThreadId,
    start: Instant,
}

/// What a context has in common with its copies.
#[derive(Debug, Default)]
struct Shared {
    cancelled: AtomicBool,
    progress: Progress,
    /// When the watch was last asked, in milliseconds from its start.
    asked: AtomicU64,
}

impl Default for Context {
    fn default() -> Self {
        Context::new(None, 0)
    }
}

impl Context {
    /// A context with `n_jobs` threads (see [`threads`]) and a seed.
    pub fn new(n_jobs: Option<i64>, seed: u64) -> Self {
        Context { n_jobs, threads: OnceLock::new(), seed, watch: None, shared: Arc::default() }
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

    /// The same context, whose checks on the calling thread now and then ask `stop` whether to cancel: for work that
    /// stays on the thread which signals are answered on.
    pub fn watched(self, stop: fn() -> bool) -> Self {
        let watch = Watch { stop, thread: std::thread::current().id(), start: Instant::now() };
        Context { watch: Some(watch), ..self }
    }

    /// Fails once [`Context::cancel`] was called. Cheap: call it once a block of rows.
    pub fn check(&self) -> Result<()> {
        if self.shared.cancelled.load(Ordering::Relaxed) || self.watch.as_ref().is_some_and(|watch| self.asks(watch)) {
            return Err(Error::Interrupted);
        }
        Ok(())
    }

    /// Asks the watch if it is time; cancels if it says so.
    fn asks(&self, watch: &Watch) -> bool {
        if watch.thread != std::thread::current().id() {
            return false;
        }
        let (now, last) = (watch.start.elapsed(), self.shared.asked.load(Ordering::Relaxed));
        if now < Duration::from_millis(last) + WATCHED {
            return false;
        }
        self.shared.asked.store(now.as_millis() as u64, Ordering::Relaxed);
        let stops = (watch.stop)();
        if stops {
            self.cancel();
        }
        stops
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
        match pool(self.threads()) {
            Some(pool) => pool.install(work),
            None => alone(work),
        }
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
        match pool(self.threads()) {
            Some(pool) => pool.in_place_scope(|scope| {
                for _ in 1..threads {
                    scope.spawn(|_| drain());
                }
                drain();
            }),
            None => drain(),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forks_leave_pools_behind() {
        let threads = || Context::new(Some(2), 0).map(4, |index| Ok((index, rayon::current_num_threads()))).unwrap();
        // More generations than there are lists.
        for _ in 0..200 {
            assert_eq!(threads(), [(0, 2), (1, 2), (2, 2), (3, 2)]);
            forked();
        }
    }

    #[test]
    fn pools_are_made_once() {
        let same = || std::ptr::eq(pool(3).unwrap(), pool(3).unwrap());
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..8).map(|_| scope.spawn(same)).collect();
            assert!(all.into_iter().all(|thread| thread.join().unwrap()));
        });
    }

    #[test]
    fn one_thread_can_do_it_alone() {
        for _ in 0..3 {
            let sum: usize = alone(|| (0..1000usize).into_par_iter().sum());
            assert_eq!(sum, 499_500);
        }
    }
}
