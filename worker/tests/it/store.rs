//! The snapshot store over real QUIC: put, commit, list and get; shards that restart, fewer and more of them; damage.

use crate::net::{Job, transport};
use arc_topk_common::ids::{Rank, RunId, Step};
use arc_topk_common::wire::{Manifest, Owner, PartInfo, SnapshotId, StoreCode};
use arc_topk_ps::server::{ServeError, Server};
use arc_topk_ps::store::StoreOptions;
use arc_topk_transport::{Identity, TransportError};
use arc_topk_worker::store::{StoreClient, StoreConfig, StoreError};
use bytes::Bytes;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

const RUN: RunId = RunId([7; 16]);

fn id(step: u64) -> SnapshotId {
    SnapshotId {
        step: Step(step),
        run: RUN,
    }
}

fn owners(ranks: u16) -> Vec<Owner> {
    let ranks = (0..ranks).map(|rank| Owner::Rank(Rank(rank)));
    [Owner::Replica].into_iter().chain(ranks).collect()
}

/// Bytes that differ from part to part; more than one block, and nothing that divides evenly.
fn blob(step: u64, owner: Owner) -> Bytes {
    let salt = match owner {
        Owner::Replica => 1,
        Owner::Rank(rank) => 2 + u64::from(rank.0),
    };
    let mut state = step * 1000 + salt;
    let bytes = (0..3_500_001).map(|_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    });
    bytes.collect::<Vec<u8>>().into()
}

/// Shards with directories below one of the test.
struct Shards {
    job: Job,
}

impl Shards {
    fn start(shards: u16) -> Self {
        let mut this = Self {
            job: Job::prepare(2),
        };
        this.restart(shards);
        this
    }

    fn dir(&self, shard: u16) -> PathBuf {
        self.job.place("snapshots").join(format!("shard-{shard}"))
    }

    /// Ends all shards, and starts so many with the directories of the same numbers.
    fn restart(&mut self, shards: u16) {
        for server in self.job.servers.drain(..) {
            self.job.runtime.block_on(server.shutdown("restart"));
        }
        for shard in 0..shards {
            let store = StoreOptions {
                dir: Some(self.dir(shard)),
                ..StoreOptions::default()
            };
            let server = self.serve(shard, shards, store);
            self.job.servers.push(server);
        }
    }

    fn serve(&self, shard: u16, shards: u16, store: StoreOptions) -> Server {
        let any = "127.0.0.1:0".parse().unwrap();
        let mut options = self.job.options(any, shard, shards);
        options.store = store;
        self.job.runtime.block_on(Server::start(options)).unwrap()
    }

    fn config(&self) -> StoreConfig {
        let identity = Identity::load(&self.job.place("worker")).unwrap();
        StoreConfig {
            transport: transport(),
            ..StoreConfig::new(&self.job.addresses(), identity)
        }
    }

    fn client(&self) -> StoreClient {
        StoreClient::new(self.config()).unwrap()
    }

    /// All files of pieces and manifests of a shard.
    fn files(&self, shard: u16) -> Vec<PathBuf> {
        let mut files = Vec::new();
        for dir in fs::read_dir(self.dir(shard)).unwrap() {
            let dir = dir.unwrap().path();
            if dir.is_dir() {
                files.extend(fs::read_dir(dir).unwrap().map(|file| file.unwrap().path()));
            }
        }
        files.sort();
        files
    }
}

fn upload(client: &StoreClient, step: u64, ranks: u16) -> Manifest {
    let put = |owner| {
        client
            .upload_part(id(step), owner, blob(step, owner))
            .unwrap()
    };
    let parts: Vec<PartInfo> = owners(ranks).into_iter().map(put).collect();
    Manifest {
        snapshot: id(step),
        update: step - 1,
        members: ranks,
        parts,
    }
}

fn store(client: &StoreClient, step: u64, ranks: u16) -> Manifest {
    let manifest = upload(client, step, ranks);
    client.commit(manifest.clone()).unwrap();
    manifest
}

/// The newest snapshot is that of `step`, and every part of it is what was stored.
fn check_newest(client: &StoreClient, step: u64, ranks: u16) {
    let newest = client.newest().unwrap().unwrap();
    assert_eq!((newest.id(), newest.manifest.update), (id(step), step - 1));
    let ranks: Vec<Rank> = (0..ranks).map(Rank).collect();
    assert_eq!(newest.manifest.ranks().collect::<Vec<_>>(), ranks);
    for owner in newest.holders.keys() {
        let part = client.fetch_part(&newest, *owner).unwrap();
        assert!(
            part == blob(step, *owner),
            "the {owner} part of step {step}"
        );
    }
}

#[test]
fn a_snapshot_is_stored_on_three_shards_and_comes_back() {
    let shards = Shards::start(3);
    let client = shards.client();
    assert_eq!(client.newest(), Ok(None));
    store(&client, 10, 2);
    check_newest(&client, 10, 2);
    // Parts without a manifest are no restart point; a joiner can have the replica all the same.
    let manifest = upload(&client, 20, 2);
    check_newest(&client, 10, 2);
    assert!(client.fetch_replica(id(20)).unwrap() == blob(20, Owner::Replica));
    let survey = client.survey().unwrap();
    assert_eq!(
        survey.parts_of(id(20)).cloned().collect::<Vec<_>>(),
        manifest.parts
    );
    assert_eq!(survey.passed_over.len(), 1);
    assert!(survey.passed_over[0].reason.contains("not committed"));
    // Again is no error.
    client.commit(manifest.clone()).unwrap();
    client.commit(manifest).unwrap();
    upload(&client, 20, 2);
    check_newest(&client, 20, 2);
    // The newest two stay.
    store(&client, 30, 2);
    let steps: Vec<u64> = client
        .survey()
        .unwrap()
        .complete
        .iter()
        .map(|info| info.id().step.0)
        .collect();
    assert_eq!(steps, [30, 20]);
    let status = shards.job.servers[0].store_status();
    assert_eq!(status.snapshots.len(), 2);
    assert!(status.snapshots.iter().all(|one| one.age_seconds.is_some()));
    assert!(
        shards.job.servers[0]
            .metrics()
            .contains("arc_snapshots 2\n")
    );
    assert_eq!(shards.files(0).len(), 2 * (3 + 1));
    drop(client);
    shards.job.shutdown();
}

#[test]
fn shards_find_their_files_again() {
    let mut shards = Shards::start(3);
    store(&shards.client(), 10, 2);
    let before = store(&shards.client(), 20, 2);
    // An hour passes.
    for file in shards.files(0) {
        let file = fs::File::options().write(true).open(file).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(3600))
            .unwrap();
    }
    shards.restart(3);
    let client = shards.client();
    check_newest(&client, 20, 2);
    let status = shards.job.servers[0].store_status();
    let ages: Vec<_> = status.snapshots.iter().map(|one| one.age_seconds).collect();
    assert_eq!(ages.len(), 2);
    assert!(ages.iter().all(|age| *age >= Some(3600)), "{ages:?}");
    assert_eq!(client.newest().unwrap().unwrap().manifest, before);
    store(&client, 30, 2);
    check_newest(&client, 30, 2);
    drop(client);
    shards.job.shutdown();
}

#[test]
fn two_shards_serve_the_files_of_three() {
    let mut shards = Shards::start(3);
    store(&shards.client(), 10, 2);
    shards.restart(2);
    let incomplete = shards.client().survey().unwrap();
    assert!(incomplete.complete.is_empty());
    assert!(
        incomplete.passed_over[0].reason.contains("piece 2 of 3"),
        "{incomplete:?}"
    );
    // Whoever took that for nothing would begin anew, and lose what is whole again in a moment.
    let error = shards.client().newest().unwrap_err().to_string();
    assert!(
        error.contains("step 10") && error.contains("piece 2 of 3"),
        "{error}"
    );
    shards.restart(0);
    copy(&shards.dir(2), &shards.dir(1));
    shards.restart(2);
    let client = shards.client();
    check_newest(&client, 10, 2);
    store(&client, 20, 2);
    check_newest(&client, 20, 2);
    drop(client);
    shards.job.shutdown();
}

#[test]
fn four_shards_serve_the_files_of_three() {
    let mut shards = Shards::start(3);
    store(&shards.client(), 10, 2);
    shards.restart(4);
    let client = shards.client();
    check_newest(&client, 10, 2);
    store(&client, 20, 3);
    check_newest(&client, 20, 3);
    drop(client);
    shards.job.shutdown();
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            fs::create_dir_all(&to).unwrap();
            copy(&path, &to);
        } else {
            fs::copy(&path, &to).unwrap();
        }
    }
}

/// Damages the first piece file of `step` on a shard, in its last byte.
fn damage(shards: &Shards, shard: u16, step: u64) -> PathBuf {
    let files = shards.files(shard);
    let of_step = |path: &&PathBuf| {
        let dir = path
            .parent()
            .unwrap()
            .file_name()
            .unwrap()
            .to_str()
            .unwrap();
        dir.starts_with(&format!("step-{step:08}")) && path.extension().is_some()
    };
    let path = files.iter().find(of_step).unwrap().clone();
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn a_damaged_piece_sends_the_job_to_the_snapshot_before() {
    let mut shards = Shards::start(3);
    store(&shards.client(), 10, 2);
    store(&shards.client(), 20, 2);
    // While the shard runs, the reader notices.
    damage(&shards, 1, 20);
    let client = shards.client();
    let newest = client.newest().unwrap().unwrap();
    assert_eq!(newest.id(), id(20));
    let failed = owners(2)
        .into_iter()
        .find_map(|owner| client.fetch_part(&newest, owner).err());
    assert!(
        matches!(failed, Some(StoreError::Damaged { .. })),
        "{failed:?}"
    );
    // From then on the shard does not offer it.
    check_newest(&client, 10, 2);
    drop(client);
    // At a start the shard notices, too.
    shards.restart(3);
    let client = shards.client();
    check_newest(&client, 10, 2);
    let survey = client.survey().unwrap();
    assert_eq!(survey.passed_over[0].snapshot, id(20));
    drop(client);
    shards.job.shutdown();
}

#[test]
fn another_holder_serves_where_one_is_damaged() {
    let mut shards = Shards::start(3);
    store(&shards.client(), 10, 2);
    shards.restart(0);
    copy(&shards.dir(1), &shards.dir(2));
    shards.restart(3);
    damage(&shards, 1, 10);
    let client = shards.client();
    check_newest(&client, 10, 2);
    drop(client);
    shards.job.shutdown();
}

#[test]
fn a_part_above_the_limit_is_refused_with_the_limit_named() {
    let mut shards = Shards::start(0);
    let store_options = StoreOptions {
        limit_bytes: 3_000_000,
        ..StoreOptions::default()
    };
    let server = shards.serve(0, 1, store_options);
    shards.job.servers.push(server);
    let client = shards.client();
    let small = Bytes::from(vec![1; 2_000_000]);
    client.upload_part(id(1), Owner::Replica, small).unwrap();
    let refused = client.upload_part(id(1), Owner::Rank(Rank(0)), blob(1, Owner::Replica));
    let Err(StoreError::Refused { code, detail, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(code, StoreCode::Limit);
    assert!(
        detail.contains("3000000") && detail.contains("--snapshot-limit-bytes"),
        "{detail}"
    );
    // A manifest of parts that are not there is refused.
    let manifest = upload_nothing(&client);
    assert!(matches!(
        client.commit(manifest),
        Err(StoreError::Refused {
            code: StoreCode::Missing,
            ..
        })
    ));
    drop(client);
    shards.job.shutdown();
}

fn upload_nothing(client: &StoreClient) -> Manifest {
    let mut parts: Vec<PartInfo> = client.survey().unwrap().parts_of(id(1)).cloned().collect();
    parts.push(PartInfo {
        owner: Owner::Rank(Rank(0)),
        ..parts[0].clone()
    });
    Manifest {
        snapshot: id(1),
        update: 0,
        members: 1,
        parts,
    }
}

#[test]
fn a_shard_that_is_gone_is_named() {
    let mut shards = Shards::start(2);
    let mut config = shards.config();
    config.deadline = Duration::from_millis(300);
    config.transport.connect_timeout = Duration::from_millis(300);
    store(&shards.client(), 10, 1);
    let gone = shards.job.servers.pop().unwrap();
    shards.job.runtime.block_on(gone.shutdown("test"));
    let client = StoreClient::new(config).unwrap();
    let survey = client.survey().unwrap();
    assert_eq!(survey.unreachable.len(), 1);
    assert!(survey.complete.is_empty());
    // Whether there is a snapshot nobody can know.
    let unknown = client.newest();
    assert!(
        matches!(&unknown, Err(StoreError::Transport { shard: 1, .. })),
        "{unknown:?}"
    );
    let failed = client.upload_part(id(20), Owner::Replica, blob(20, Owner::Replica));
    assert!(
        matches!(failed, Err(StoreError::Transport { shard: 1, .. })),
        "{failed:?}"
    );
    drop(client);
    shards.job.shutdown();
}

#[test]
fn a_client_survives_the_restart_of_a_shard() {
    let mut shards = Shards::start(1);
    let client = shards.client();
    store(&client, 10, 1);
    let address = shards.job.servers[0].quic_address();
    let old = shards.job.servers.pop().unwrap();
    shards.job.runtime.block_on(old.shutdown("restart"));
    let mut options = shards.job.options(address, 0, 1);
    options.store.dir = Some(shards.dir(0));
    // The old socket goes with the last task that holds it.
    let server = loop {
        let started = Server::start(options.clone());
        match shards.job.runtime.block_on(started) {
            Err(ServeError::Transport(TransportError::PortInUse { .. })) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            started => break started.unwrap(),
        }
    };
    shards.job.servers.push(server);
    check_newest(&client, 10, 1);
    drop(client);
    shards.job.shutdown();
}

#[test]
fn a_directory_serves_one_shard() {
    let shards = Shards::start(1);
    let any = "127.0.0.1:0".parse().unwrap();
    let mut options = shards.job.options(any, 1, 2);
    options.store.dir = Some(shards.dir(0));
    let refused = shards
        .job
        .runtime
        .block_on(Server::start(options))
        .unwrap_err();
    assert!(refused.to_string().contains("of its own"), "{refused}");
    shards.job.shutdown();
}
