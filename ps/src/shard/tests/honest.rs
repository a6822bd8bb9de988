//! One worker that keeps the rules, whatever the others do.

use super::*;
use arc_topk_common::wire::Direction;

/// Steps before the open one whose answers it keeps, to tell them.
const KEPT_STEPS: u64 = 2;

pub(super) struct Honest {
    session: u64,
    place: Option<Place>,
    connected: bool,
    refused: bool,
    /// It was away, or the shard was restarted: rounds may have gone on without it, or others told what was first.
    disturbed: bool,
    step: u64,
    update: u64,
    /// Kind of its open frame and the rows chosen.
    open: Option<(FrameKind, Option<Vec<Vec<u32>>>)>,
    sent: bool,
    kept: Vec<(FrameHeader, Bytes)>,
}

impl Honest {
    const INCARNATION: [u8; 16] = [200; 16];

    /// Its Hello comes first: a job that others began may well have another start or plan.
    pub(super) fn join(bench: &mut Bench) -> Self {
        let mut honest = Self {
            session: 100,
            place: None,
            connected: true,
            refused: false,
            disturbed: false,
            step: 0,
            update: 0,
            open: None,
            sent: false,
            kept: Vec::new(),
        };
        let hello = Hello {
            incarnation: Self::INCARNATION,
            ..hello(&bench.plan.spec)
        };
        let actions = bench.hello(honest.session, hello);
        honest.hear(bench, &actions);
        honest
    }

    fn plays(&self) -> bool {
        self.connected && !self.refused && self.place.is_some()
    }

    /// Sends its open frame, if that has not been sent on this connection.
    pub(super) fn play(&mut self, bench: &mut Bench) -> Vec<Action> {
        let Some((kind, rows)) = self.open.clone().filter(|_| self.plays() && !self.sent) else {
            return Vec::new();
        };
        self.sent = true;
        let shape = bench.shape(self.update);
        let body = match kind {
            FrameKind::Sketch => vec![0; shape.sketch_layout().bytes],
            FrameKind::Dense => vec![0; shape.dense_layout().bytes],
            FrameKind::Sparse => sparse_body(&shape),
            _ => {
                let chosen = rows.map(|rows| rows.iter().map(Vec::len).collect());
                let kept: Vec<usize> = chosen.unwrap_or_else(|| shape.keep());
                vec![0; shape.values_layout(&kept, Direction::Up).bytes]
            }
        };
        let mut head = header(kind, self.step, body.len());
        head.update = self.update;
        bench.frame(self.session, head, body)
    }

    /// Its connection is lost.
    pub(super) fn cut(&mut self, bench: &mut Bench) -> Vec<Action> {
        if !self.plays() {
            return Vec::new();
        }
        (self.connected, self.disturbed) = (false, true);
        bench.cut(self.session)
    }

    /// The shard is another process.
    pub(super) fn restarted(&mut self) {
        self.connected = false;
        self.disturbed = true;
        // It has no place to come back to, and would join with the others.
        self.refused |= self.place.is_none();
    }

    /// It comes again, tells what it holds if it is asked to, and sends its open frame anew.
    pub(super) fn come_back(&mut self, bench: &mut Bench) -> Vec<Action> {
        let Some(place) = self
            .place
            .clone()
            .filter(|_| !self.connected && !self.refused)
        else {
            return Vec::new();
        };
        self.session += 1;
        self.connected = true;
        self.sent = false;
        let hello = Hello {
            incarnation: Self::INCARNATION,
            ..member(&bench.plan.spec, place, self.step)
        };
        let actions = bench.hello(self.session, hello);
        let retell = welcomes(&actions)
            .iter()
            .any(|(session, welcome)| *session == self.session && welcome.retell);
        self.hear(bench, &actions);
        if retell && self.plays() {
            let frames = self.kept.len() as u32;
            let actions = bench.control(self.session, Control::Retelling { frames });
            self.hear(bench, &actions);
        }
        for (mut header, body) in self.kept.clone() {
            if retell && self.plays() {
                header.flags.held = true;
                header.lead = 0;
                let actions = bench.frame(self.session, header, body.to_vec());
                self.hear(bench, &actions);
            }
        }
        Vec::new()
    }

    pub(super) fn hear(&mut self, bench: &Bench, actions: &[Action]) {
        for action in actions {
            match action {
                Action::Control { session, message } if session.0 == self.session => {
                    match message {
                        Control::Welcome(welcome) => {
                            self.place = Some(welcome.place.clone());
                            if self.open.is_none() {
                                self.begin(bench);
                            }
                        }
                        Control::Membership {
                            epoch,
                            next_rank,
                            members,
                            ..
                        } => {
                            if let Some(place) = &mut self.place
                                && members.contains(&place.rank)
                            {
                                place.epoch = *epoch;
                                place.next_rank = *next_rank;
                                place.members.clone_from(members);
                            }
                        }
                        _ => {}
                    }
                }
                Action::Round {
                    session,
                    header,
                    body,
                } if session.0 == self.session => self.answered(bench, *header, body),
                Action::Close {
                    session,
                    code,
                    detail,
                } if session.0 == self.session => self.closed(*code, detail),
                _ => {}
            }
        }
    }

    /// What it may be refused for though it keeps the rules; see the property.
    fn closed(&mut self, code: RefusalCode, detail: &str) {
        self.refused = true;
        let others_update = detail.contains("schedules have come apart")
            || detail.contains("an update number never falls");
        let without_it = self.disturbed && code == RefusalCode::Superseded;
        let too_few = code == RefusalCode::TooFewWorkers;
        let runs_already = self.place.is_none() && code == RefusalCode::World;
        assert!(
            too_few || others_update || without_it || runs_already,
            "{code:?}: {detail}"
        );
    }

    fn begin(&mut self, bench: &Bench) {
        let shape = bench.shape(self.update);
        self.open = Some((shape.phases()[0].up, None));
        self.sent = false;
    }

    fn answered(&mut self, bench: &Bench, header: FrameHeader, body: &Bytes) {
        assert_eq!((header.step, header.update), (Step(self.step), self.update));
        assert!(header.flags.counted || header.flags.non_finite || self.disturbed);
        self.kept.push((header, body.clone()));
        if header.kind == FrameKind::Selection && !header.flags.non_finite {
            let shape = bench.shape(self.update);
            let payload = &body[..header.payload_bytes()];
            let rows = shape.decode_selection_body(payload).unwrap().rows;
            self.open = Some((FrameKind::Values, Some(rows)));
            self.sent = false;
            return;
        }
        self.step += 1;
        self.update += u64::from(!header.flags.non_finite);
        let low = self.step.saturating_sub(KEPT_STEPS);
        self.kept.retain(|(header, _)| header.step.0 >= low);
        self.begin(bench);
    }
}

/// The first rows of every segment.
fn sparse_body(shape: &RoundShape) -> Vec<u8> {
    let mut out = Vec::new();
    for segment in &shape.sparse {
        let rows: Vec<u32> = (0..segment.keep as u32).collect();
        arc_topk_common::wire::append_selection(segment.rows, &rows, &mut out);
        F32.encode(&vec![0.0; rows.len() * segment.width], &mut out);
    }
    for segment in &shape.dense {
        F32.encode(&vec![0.0; segment.elements()], &mut out);
    }
    out
}
