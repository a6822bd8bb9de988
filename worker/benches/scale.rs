//! Many workers of one job on this machine: what a step costs each of them and the shards, and what a shard holds.
//!
//! Shards are processes (`arc-ps`), so that their processor time and memory are theirs alone; workers are threads of this one,
//! each with connections, an engine and feedback state of its own, over loopback QUIC with TLS. All share the machine's cores, so
//! that the time of a step grows with the number of workers; what a worker costs should not.
//!
//! `make bench-scale ARGS='--workers 4,16,64,256'`.
#![allow(
    clippy::unwrap_used,
    reason = "a program that stops at the first surprise"
)]

use arc_topk_common::config::AlgorithmConfig;
use arc_topk_common::ids::TensorId;
use arc_topk_common::plan::{DType, PlanSpec, TensorSpec};
use arc_topk_transport::Identity;
use arc_topk_transport::certs::{CertRequest, JobCerts, make_job_certs};
use arc_topk_worker::reducer::Reducer;
use arc_topk_worker::session::{NetConfig, QuicReducer};
use clap::Parser;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// Of the clock in /proc/PID/stat, a second.
const TICKS: f64 = 100.0;

#[derive(Parser)]
struct Options {
    /// Numbers of workers.
    #[arg(long, value_delimiter = ',', default_value = "4,16,64,256")]
    workers: Vec<u16>,
    /// Shards.
    #[arg(long, default_value_t = 4)]
    shards: u16,
    /// Tensors of 256 × 256 that a worker has.
    #[arg(long, default_value_t = 16)]
    tensors: u32,
    /// Steps that are measured.
    #[arg(long, default_value_t = 20)]
    steps: u64,
    /// The program arc-ps.
    #[arg(long, default_value = "target/release/arc-ps")]
    program: PathBuf,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Shards as processes; they end with it.
struct Shards(Vec<Child>);

impl Shards {
    fn start(options: &Options, workers: u16, certs: &JobCerts) -> (Self, Vec<String>) {
        // All ports are found before one is given back, so that they differ.
        let sockets: Vec<UdpSocket> = (0..options.shards)
            .map(|_| UdpSocket::bind("127.0.0.1:0").unwrap())
            .collect();
        let address = |socket: &UdpSocket| socket.local_addr().unwrap().to_string();
        let addresses: Vec<String> = sockets.iter().map(address).collect();
        drop(sockets);
        let start = |(shard, address): (usize, &String)| {
            Command::new(&options.program)
                .arg(format!("--listen={address}"))
                .arg(format!("--certs={}", certs.shard.display()))
                .arg(format!("--shard={shard}"))
                .arg(format!("--shards={}", options.shards))
                .arg(format!("--workers={workers}"))
                .args(["--admin=off", "--start-grace-seconds=0"])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap_or_else(|e| {
                    panic!(
                        "{}: {e}; cargo build --release --bins",
                        options.program.display()
                    )
                })
        };
        let children = addresses.iter().enumerate().map(start).collect();
        (Self(children), addresses)
    }

    /// Processor seconds of all.
    fn cpu(&self) -> f64 {
        self.0.iter().map(|child| cpu(child.id())).sum()
    }

    /// The largest peak of memory, MB.
    fn peak(&self) -> f64 {
        let peaks = self.0.iter().map(|child| peak(child.id()));
        peaks.fold(0.0, f64::max)
    }
}

impl Drop for Shards {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _gone = child.kill();
            let _reaped = child.wait();
        }
    }
}

/// Processor seconds of a process, in user and kernel mode.
fn cpu(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let ticks = |at: usize| fields[at].parse::<f64>().unwrap();
    (ticks(11) + ticks(12)) / TICKS
}

/// Peak resident memory of a process, MB.
fn peak(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .unwrap();
    let kilobytes: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kilobytes / 1e3
}

fn spec(options: &Options) -> PlanSpec {
    let tensors = (0..options.tensors).map(|at| TensorSpec {
        name: format!("t{at}"),
        shape: vec![256, 256],
        dtype: DType::F32,
        density: None,
    });
    PlanSpec {
        trainer: String::new(),
        algorithm: AlgorithmConfig {
            warmup_updates: 1,
            bucket_bytes: 1 << 20,
            ..AlgorithmConfig::default()
        },
        shards: options.shards,
        tensors: tensors.collect(),
    }
}

/// What the steps of a job took.
struct Measured {
    /// Median of worker 0, seconds.
    step: f64,
    /// Processor seconds of a worker, and of all shards, a step.
    worker_cpu: f64,
    shards_cpu: f64,
    /// Peak memory of the largest shard, MB.
    shard_memory: f64,
    /// Sent by a worker in a step.
    bytes: u64,
}

/// One step after the other of one worker.
fn train(worker: &mut QuicReducer, gradient: &[f32], steps: u64) -> (Vec<f64>, u64) {
    let (mut taken, mut bytes) = (Vec::new(), 0);
    let tensors = worker.plan().tensors.len() as u32;
    for _ in 0..steps {
        let begun = Instant::now();
        worker.begin().unwrap();
        for tensor in (0..tensors).rev() {
            worker.push(TensorId(tensor), gradient).unwrap();
        }
        bytes = worker.finish().unwrap().stats.sent.total();
        taken.push(begun.elapsed().as_secs_f64());
    }
    (taken, bytes)
}

fn measure(options: &Options, workers: u16, certs: &JobCerts) -> Measured {
    let (shards, addresses) = Shards::start(options, workers, certs);
    let identity = Identity::load(&certs.worker).unwrap();
    let mut config = NetConfig::new("default", &addresses, identity);
    config.io_threads = 1;
    config.connect_timeout = Duration::from_secs(120);
    config.progress_timeout = Duration::from_secs(600);
    // Hundreds of handshakes on a few cores are no lost peers.
    config.transport.idle_timeout = Duration::from_secs(60);
    let spec = spec(options);
    let gradient: Vec<f32> = (0..256 * 256)
        .map(|at| ((at * 37 % 101) as f32 - 50.0) / 50.0)
        .collect();
    let barrier = Barrier::new(usize::from(workers) + 1);
    let (before, taken) = std::thread::scope(|scope| {
        let run = || {
            let worker = QuicReducer::connect(config.clone(), spec.clone());
            let mut worker = worker.unwrap_or_else(|error| panic!("a worker cannot join: {error}"));
            // The warm-up, and one more.
            train(&mut worker, &gradient, 2);
            barrier.wait();
            barrier.wait();
            let taken = train(&mut worker, &gradient, options.steps);
            barrier.wait();
            barrier.wait();
            Box::new(worker).leave();
            taken
        };
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(run)).collect();
        barrier.wait();
        let before = (cpu(std::process::id()), shards.cpu());
        barrier.wait();
        barrier.wait();
        let after = (cpu(std::process::id()), shards.cpu(), shards.peak());
        barrier.wait();
        let taken: Vec<_> = threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect();
        ((after.0 - before.0, after.1 - before.1, after.2), taken)
    });
    let (mut times, bytes) = taken.into_iter().next().unwrap();
    times.sort_by(f64::total_cmp);
    let steps = options.steps as f64;
    Measured {
        step: times[times.len() / 2],
        worker_cpu: before.0 / steps / f64::from(workers),
        shards_cpu: before.1 / steps,
        shard_memory: before.2,
        bytes,
    }
}

fn main() {
    let options = Options::parse();
    let dir = tempfile::tempdir().unwrap();
    let certs = make_job_certs(dir.path(), &CertRequest::new("default", &[], 1)).unwrap();
    let megabytes = f64::from(options.tensors) * 256.0 * 256.0 * 4.0 / 1e6;
    println!(
        "{megabytes:.1} MB of gradient a worker, {} shards, loopback; the defaults",
        options.shards
    );
    println!(
        "| workers | step (ms) | processor time of a worker (ms a step) | of all shards, by worker (ms a step) | largest shard's memory (MB) | sent by a worker (kB a step) |"
    );
    println!("|---|---|---|---|---|---|");
    for workers in options.workers.clone() {
        let measured = measure(&options, workers, &certs);
        println!(
            "| {workers} | {:.0} | {:.2} | {:.2} | {:.1} | {:.0} |",
            1e3 * measured.step,
            1e3 * measured.worker_cpu,
            1e3 * measured.shards_cpu / f64::from(workers),
            measured.shard_memory,
            measured.bytes as f64 / 1e3
        );
    }
}
