use super::*;
use crate::store::index::{Index, Ticket};
use crate::store::refusal::Refusal;
use arc_topk_common::wire::MOST_FILLING_SNAPSHOTS;
use arc_topk_common::wire::{HeldSnapshot, StoreCode, StoreResponse};
use proptest::prelude::*;

fn meta(snapshot: SnapshotId, number: u16) -> PieceMeta {
    piece(snapshot, owner(number), &[number as u8; 100], 0).0
}

fn put(index: &mut Index, meta: &PieceMeta) -> Result<(), Refusal> {
    let (ticket, _) = index.begin(meta)?;
    index.finish(ticket)
}

/// Replica and one rank.
fn store(index: &mut Index, snapshot: SnapshotId) -> Result<(), Refusal> {
    let metas = [meta(snapshot, 0), meta(snapshot, 1)];
    metas.iter().try_for_each(|meta| put(index, meta))?;
    index.commit(manifest(snapshot, &metas)).map(drop)
}

fn held(index: &Index) -> Vec<(SnapshotId, bool)> {
    let listing = index.listing().into_iter();
    listing
        .map(|held| (held.snapshot, held.manifest.is_some()))
        .collect()
}

#[test]
fn the_newest_stay_and_those_that_are_filled() {
    let mut index = Index::new(&options(2, 10_000));
    for step in [10, 20, 30] {
        store(&mut index, id(1, step)).unwrap();
    }
    put(&mut index, &meta(id(1, 40), 0)).unwrap();
    assert_eq!(
        held(&index),
        [(id(1, 20), true), (id(1, 30), true), (id(1, 40), false)]
    );
    // For one that joins, one that joins a moment later, and the job: none pushes out another.
    for step in [41, 42] {
        let (_, removals) = index.begin(&meta(id(1, step), 0)).unwrap();
        assert_eq!(removals.snapshots, []);
    }
    let (_, removals) = index.begin(&meta(id(1, 50), 0)).unwrap();
    assert_eq!(removals.snapshots, [id(1, 40)]);
}

#[test]
fn a_commit_leaves_what_one_that_joins_is_about_to_fetch() {
    let mut index = Index::new(&options(2, 10_000));
    put(&mut index, &meta(id(1, 40), 0)).unwrap();
    store(&mut index, id(1, 50)).unwrap();
    assert_eq!(held(&index), [(id(1, 40), false), (id(1, 50), true)]);
    put(&mut index, &meta(id(1, 41), 0)).unwrap();
}

#[test]
fn what_comes_too_late_is_refused() {
    let mut index = Index::new(&options(2, 10_000));
    for step in [40, 41, 42] {
        put(&mut index, &meta(id(1, step), 0)).unwrap();
    }
    assert_eq!(
        index.begin(&meta(id(1, 30), 0)).unwrap_err().code(),
        StoreCode::Stale
    );
}

#[test]
fn a_committed_snapshot_takes_nothing_else() {
    let mut index = Index::new(&options(2, 10_000));
    store(&mut index, id(1, 20)).unwrap();
    put(&mut index, &meta(id(1, 20), 1)).unwrap();
    let other = piece(id(1, 20), owner(1), &[9; 100], 0).0;
    assert_eq!(index.begin(&other), Err(Refusal::Conflict(id(1, 20))));
    assert_eq!(
        index.begin(&meta(id(1, 20), 2)),
        Err(Refusal::Conflict(id(1, 20)))
    );
    let less = manifest(id(1, 20), &[meta(id(1, 20), 0)]);
    assert_eq!(index.commit(less), Err(Refusal::Conflict(id(1, 20))));
    // A Put that began before the commit cannot slip in after it.
    let mut index = Index::new(&options(2, 10_000));
    let metas = [meta(id(1, 20), 0), meta(id(1, 20), 1)];
    metas.iter().for_each(|meta| put(&mut index, meta).unwrap());
    let (ticket, _) = index.begin(&other).unwrap();
    index.commit(manifest(id(1, 20), &metas)).unwrap();
    assert_eq!(index.finish(ticket), Err(Refusal::Conflict(id(1, 20))));
    assert_eq!(index.incoming_bytes(), 0);
}

#[test]
fn a_commit_drops_what_its_manifest_does_not_name_and_needs_what_it_names() {
    let mut index = Index::new(&options(2, 10_000));
    let snapshot = id(1, 20);
    let metas: Vec<PieceMeta> = (0..3).map(|number| meta(snapshot, number)).collect();
    metas.iter().for_each(|meta| put(&mut index, meta).unwrap());
    let more = manifest(snapshot, &[metas[0].clone(), meta(snapshot, 7)]);
    assert_eq!(index.commit(more).unwrap_err().code(), StoreCode::Missing);
    let removals = index.commit(manifest(snapshot, &metas[..2])).unwrap();
    assert_eq!(removals.pieces, [(snapshot, (owner(2), 2, 0))]);
}

/// A job that restarts from step 20 comes to steps of which the abandoned course still has snapshots.
#[test]
fn another_run_replaces_an_abandoned_course() {
    let mut index = Index::new(&options(2, 10_000));
    store(&mut index, id(9, 20)).unwrap();
    store(&mut index, id(9, 40)).unwrap();
    store(&mut index, id(1, 30)).unwrap();
    assert_eq!(held(&index), [(id(9, 20), true), (id(1, 30), true)]);
}

#[test]
fn the_limit_counts_what_is_coming_and_what_is_dropped_makes_room() {
    let mut index = Index::new(&options(1, 120));
    let (ticket, _) = index.begin(&meta(id(1, 10), 0)).unwrap();
    index.begin(&meta(id(1, 10), 1)).unwrap();
    let refused = index.begin(&meta(id(1, 10), 2)).unwrap_err();
    assert_eq!(refused.code(), StoreCode::Limit);
    assert!(refused.to_string().contains("may hold 120"), "{refused}");
    index.finish(ticket).unwrap();
    assert_eq!((index.held_bytes(), index.incoming_bytes()), (50, 50));
    // What an abandoned run has left behind.
    let (_, removals) = index.begin(&meta(id(2, 20), 0)).unwrap();
    assert_eq!(removals.snapshots, [id(1, 10)]);
    assert_eq!((index.held_bytes(), index.incoming_bytes()), (0, 50));
}

#[test]
fn a_put_that_ends_early_leaves_nothing() {
    let mut index = Index::new(&options(1, 1000));
    let (ticket, _) = index.begin(&meta(id(1, 10), 0)).unwrap();
    let removals = index.abandon(ticket);
    assert_eq!(removals.snapshots, [id(1, 10)]);
    assert_eq!((held(&index), index.incoming_bytes()), (vec![], 0));
    assert_eq!(index.finish(ticket), Err(Refusal::Dropped(id(1, 10))));
}

#[derive(Clone, Debug)]
enum Event {
    Begin(SnapshotId, u16, u8),
    Finish(usize),
    Abandon(usize),
    Commit(SnapshotId),
    Restart,
}

fn any_event() -> impl Strategy<Value = Event> {
    let snapshot = || (1u8..3, 1u64..8).prop_map(|(run, step)| id(run, step));
    prop_oneof![
        6 => (snapshot(), 0u16..3, 0u8..2).prop_map(|(id, number, salt)| Event::Begin(id, number, salt)),
        6 => (0usize..4).prop_map(Event::Finish),
        1 => (0usize..4).prop_map(Event::Abandon),
        4 => snapshot().prop_map(Event::Commit),
        1 => Just(Event::Restart),
    ]
}

fn check(index: &Index, keep: usize, limit: u64) {
    let listing = index.listing();
    let committed = |held: &&HeldSnapshot| held.manifest.is_some();
    let kept = listing.iter().filter(committed).count();
    assert!(
        kept <= keep && listing.len() <= kept + MOST_FILLING_SNAPSHOTS,
        "{listing:?}"
    );
    assert!(index.held_bytes() + index.incoming_bytes() <= limit);
    for held in listing.iter().filter(committed) {
        let manifest = held.manifest.as_ref().unwrap();
        let named = |held: &arc_topk_common::wire::HeldPiece| {
            manifest.part(held.part.owner) == Some(&held.part)
        };
        assert!(held.pieces.iter().all(named));
    }
    let bytes = StoreResponse::Listing(listing.clone()).encode();
    assert_eq!(
        StoreResponse::decode(&bytes),
        Ok(StoreResponse::Listing(listing))
    );
}

proptest! {
    /// After any sequence of events the rules of the module hold, a commit that was confirmed is there, and a restart
    /// with what was stored changes nothing but what was coming.
    #[test]
    fn rules_hold(keep in 1usize..4, limit in 100u64..600, events in prop::collection::vec(any_event(), 0..80)) {
        let options = options(keep, limit);
        let mut index = Index::new(&options);
        let mut tickets: Vec<Ticket> = Vec::new();
        for event in events {
            match event {
                Event::Begin(snapshot, number, salt) => {
                    let blob = vec![salt; 60 + usize::from(number)];
                    let meta = piece(snapshot, owner(number), &blob, 0).0;
                    if let Ok((ticket, removals)) = index.begin(&meta) {
                        prop_assert!(!removals.snapshots.contains(&snapshot));
                        tickets.push(ticket);
                    }
                }
                Event::Finish(at) if at < tickets.len() => {
                    let ticket = tickets.swap_remove(at);
                    let wanted = index.awaits(ticket);
                    let done = index.finish(ticket);
                    prop_assert!(wanted || done.is_err());
                }
                Event::Abandon(at) if at < tickets.len() => {
                    drop(index.abandon(tickets.swap_remove(at)));
                }
                Event::Finish(_) | Event::Abandon(_) => {}
                Event::Commit(snapshot) => {
                    let listing = index.listing();
                    let held = listing.iter().find(|held| held.snapshot == snapshot);
                    let parts = held.map(|held| held.pieces.iter().map(|held| held.part.clone()).collect());
                    let manifest = Manifest { snapshot, update: 0, members: 9, parts: parts.unwrap_or_default() };
                    let whole = manifest.part(Owner::Replica).is_some();
                    if whole && index.commit(manifest.clone()).is_ok() {
                        let listing = index.listing();
                        let held = listing.iter().find(|held| held.snapshot == snapshot).unwrap();
                        prop_assert_eq!(held.manifest.as_ref(), Some(&manifest));
                    }
                }
                Event::Restart => {
                    let listing = index.listing();
                    let manifests = listing.iter().filter_map(|held| held.manifest.clone()).collect();
                    let metas = listing.iter().flat_map(|held| held.pieces.iter().map(|piece| {
                        let key = (piece.part.owner, piece.part.pieces, piece.piece);
                        index.piece(held.snapshot, key).unwrap().clone()
                    })).collect();
                    let (restored, removals) = Index::restored(&options, metas, manifests);
                    prop_assert!(removals.is_empty(), "{removals:?}");
                    let filled: Vec<_> = listing.into_iter().filter(|held| held.manifest.is_some() || !held.pieces.is_empty()).collect();
                    prop_assert_eq!(restored.listing(), filled);
                    index = restored;
                    tickets.clear();
                }
            }
            check(&index, keep, limit);
        }
    }

    /// Whatever lies in a directory, the start keeps no more than it may and says what goes.
    #[test]
    fn any_directory_is_taken(keep in 1usize..4, found in prop::collection::vec((1u8..3, 1u64..8, any::<bool>()), 0..20)) {
        let options = options(keep, u64::MAX);
        let metas: Vec<_> = found.iter().map(|(run, step, _)| meta(id(*run, *step), 0)).collect();
        let manifests: Vec<_> = found.iter().zip(&metas).filter(|((_, _, committed), _)| *committed)
            .map(|(_, meta)| manifest(meta.snapshot, std::slice::from_ref(meta))).collect();
        let (index, removals) = Index::restored(&options, metas.clone(), manifests);
        check(&index, keep, u64::MAX);
        for meta in metas {
            prop_assert!(index.has(meta.snapshot) != removals.snapshots.contains(&meta.snapshot));
        }
    }
}
