//! The shards' side: connections, messages and answers, good and bad.

use super::{ME, Play, RANKS, REMEMBERED, RUN, Source, Taken, any_step};
use crate::member::Input;
use crate::step::Outgoing;
use arc_topk_common::ids::{BucketId, Epoch, Rank, RunId, ShardId, Step};
use arc_topk_common::plan::Plan;
use arc_topk_common::wire::{
    Control, Direction, FrameFlags, FrameHeader, FrameKind, Hello, Intent, PROTOCOL_VERSION, Place,
    RefusalCode, RoundShape, Welcome, append_selection, decode_roster, encode_roster,
};
use bytes::Bytes;

impl Play {
    pub(super) fn link_up(&mut self, shard: ShardId, source: &mut Source<'_>) {
        let choice = source.byte();
        let line = self.lines.get(shard.index());
        if line.is_some_and(|line| line.up) {
            // The shell has one connection with a shard.
            self.link_down(shard);
        }
        let Intent::Member { place, waited, .. } = self.member.intent(shard) else {
            panic!("a member comes as one");
        };
        if let Some(line) = self.lines.get_mut(shard.index()) {
            line.epoch = place.epoch;
            line.waits = waited;
            line.went.clear();
            line.up = true;
        }
        let place = if choice < 192 {
            place
        } else {
            any_place(source)
        };
        let welcome = Welcome {
            shard_incarnation: 1 + u64::from(choice >> 1 & 1),
            retell: choice & 1 == 1,
            place,
            step: any_step(source, self.step()),
            snapshot: choice & 4 == 4,
        };
        self.hear(Input::LinkUp { shard, welcome });
    }

    pub(super) fn link_down(&mut self, shard: ShardId) {
        if let Some(line) = self.lines.get_mut(shard.index()) {
            line.up = false;
        }
        let reason = String::new();
        self.hear(Input::LinkDown { shard, reason });
    }

    /// Every kind of message, those that no shard sends among them.
    pub(super) fn message(&self, source: &mut Source<'_>) -> Control {
        let step = any_step(source, self.step());
        match source.below(20) {
            0 => Control::Hello(Box::new(Hello {
                protocol: PROTOCOL_VERSION,
                job: String::new(),
                incarnation: [0; 16],
                shard: 0,
                host: String::new(),
                intent: Intent::Member {
                    place: any_place(source),
                    step,
                    waited: true,
                },
                plan: self.plan.spec.clone(),
            })),
            1 => Control::Welcome(Welcome {
                shard_incarnation: 3,
                retell: true,
                place: any_place(source),
                step,
                snapshot: false,
            }),
            2 => Control::Waiting {
                joined: 1,
                world: u16::MAX,
            },
            3 | 4 => Control::Refused {
                code: RefusalCode::Shutdown,
                detail: String::new(),
            },
            5 => Control::Refused {
                code: RefusalCode::ALL[source.below(RefusalCode::ALL.len() as u64) as usize],
                detail: String::new(),
            },
            6 => Control::Retelling { frames: u32::MAX },
            7 => Control::Away,
            8 => Control::Ready { step },
            9 => Control::Digest {
                step,
                digest: [0; 32],
            },
            10 => Control::DigestsDiffer {
                step,
                ranks: vec![ME],
            },
            11 => Control::Donate,
            12 => Control::Donating { step },
            13 => Control::Donated { step },
            14 => Control::Leave,
            15 => report(step),
            _ => {
                let place = any_place(source);
                Control::Membership {
                    epoch: place.epoch,
                    next_rank: place.next_rank,
                    members: place.members,
                    away: ranks(source.byte()),
                    reason: String::new(),
                }
            }
        }
    }

    /// What a shard would answer to a frame that waits.
    pub(super) fn good_answer(&mut self, shard: ShardId, source: &mut Source<'_>) {
        let waiting = self.member.machine().outstanding(shard);
        let (at, content, choice) = (source.byte(), source.byte(), source.byte());
        let Some(frame) = waiting.get(usize::from(at) % waiting.len().max(1)) else {
            return;
        };
        let (header, body) = answer(&self.plan, frame, content, choice);
        self.remember(shard, header, &body);
        self.hear_frame(shard, header, body);
    }

    /// An answer that was given before, and perhaps spoiled.
    pub(super) fn old_answer(&mut self, source: &mut Source<'_>) {
        let at = usize::from(source.byte()) % self.given.len().max(1);
        let Some((shard, mut header, body)) = self.given.get(at).cloned() else {
            return;
        };
        let mut body = body.to_vec();
        match source.byte() {
            0..160 => {}
            choice if choice % 8 == 0 => header.step = any_step(source, self.step()),
            choice if choice % 8 == 1 => header.update = any_step(source, self.step()).0,
            choice if choice % 8 == 2 => header.lead = u16::MAX,
            choice if choice % 8 == 3 => header.flags.counted = true,
            choice if choice % 8 == 4 => body.truncate(usize::from(source.byte())),
            choice if choice % 8 == 5 => {
                header.roster_bytes = u16::from(source.byte()).min(body.len() as u16);
            }
            choice => {
                let at = usize::from(source.byte()) % body.len().max(1);
                if let Some(byte) = body.get_mut(at) {
                    *byte ^= choice | 1;
                }
            }
        }
        header.body_bytes = body.len() as u32;
        self.hear_frame(shard, header, body.into());
    }

    pub(super) fn bad_frame(&mut self, shard: ShardId, source: &mut Source<'_>) {
        let kind = FrameKind::ALL[source.below(FrameKind::ALL.len() as u64) as usize];
        let choice = source.byte();
        let bytes = usize::from(source.byte() % 80);
        let body = vec![source.byte(); bytes];
        let header = FrameHeader {
            kind,
            flags: FrameFlags {
                non_finite: choice & 1 == 1,
                counted: choice & 2 == 2,
                absent: choice & 4 == 4,
                held: choice & 8 == 8,
            },
            bucket: BucketId(match choice >> 4 {
                15 => u16::MAX,
                bucket => u16::from(bucket % 4),
            }),
            epoch: Epoch(1),
            step: any_step(source, self.step()),
            update: any_step(source, Step(self.member.machine().update())).0,
            body_bytes: bytes as u32,
            roster_bytes: u16::from(source.byte()),
            lead: u16::from(source.byte()),
        };
        self.hear_frame(shard, header, body.into());
    }

    pub(super) fn remember(&mut self, shard: ShardId, header: FrameHeader, body: &Bytes) {
        if self.given.len() == REMEMBERED {
            self.given.pop_front();
        }
        self.given.push_back((shard, header, body.clone()));
    }

    pub(super) fn hear_frame(&mut self, shard: ShardId, header: FrameHeader, body: Bytes) {
        let here = !self.member.has_failed() && self.member.is_up(shard);
        let asked = self.open && header.step == self.step();
        self.hear(Input::Frame {
            shard,
            header,
            body: body.clone(),
        });
        if !here || !asked || self.member.has_failed() {
            return;
        }
        let shape = RoundShape::new(&self.plan, header.bucket, shard, header.update);
        let key = (shard, header.bucket, shape.phase_of(header.kind));
        let first = self
            .taken
            .entry(key)
            .or_insert_with(|| taken(&header, &body));
        assert_eq!(
            (first.kind, first.non_finite, &first.body),
            (header.kind, header.flags.non_finite, &body),
            "one answer to each phase"
        );
        let mine = first.holds_me && self.member.is_abstaining();
        assert!(!mine, "it takes an average of what it did not send");
    }

    pub(super) fn hear(&mut self, input: Input) {
        let refused = match &input {
            Input::Control {
                shard,
                message: Control::Refused { code, .. },
            } => (*code == RefusalCode::Shutdown).then_some(*shard),
            _ => None,
        };
        if let Some(line) = refused.and_then(|shard| self.lines.get_mut(shard.index())) {
            line.up = false;
        }
        self.call(|member, now, out| member.handle(now, input, out));
    }
}

fn taken(header: &FrameHeader, body: &Bytes) -> Taken {
    let roster = &body[body.len() - usize::from(header.roster_bytes).min(body.len())..];
    let roster = decode_roster(roster).expect("an answer that is taken has a roster");
    Taken {
        kind: header.kind,
        non_finite: header.flags.non_finite,
        holds_me: roster.contains(&ME),
        body: body.clone(),
    }
}

fn ranks(named: u8) -> Vec<Rank> {
    let named = (0..RANKS).filter(|rank| named >> rank & 1 == 1);
    named.map(|rank| Rank(rank.into())).collect()
}

/// Mostly one of this worker in this run.
fn any_place(source: &mut Source<'_>) -> Place {
    let (named, other) = (source.byte(), source.byte());
    // Without this worker the session ends, which is soon told.
    let me = if named < 240 { 1 << ME.0 } else { 0 };
    Place {
        run: if other == 255 { RunId([8; 16]) } else { RUN },
        rank: if other == 254 { Rank(0) } else { ME },
        epoch: Epoch(match source.byte() {
            255 => u32::MAX,
            epoch => u32::from(epoch % 6),
        }),
        next_rank: u16::from(RANKS) + u16::from(other & 1),
        members: ranks(named | me),
    }
}

pub(super) fn report(step: Step) -> Control {
    Control::Report {
        step,
        loss: f32::NAN,
        step_seconds: 0.0,
        wait_seconds: 0.0,
        bytes_sent: 0,
        bytes_received: 0,
        bytes_dense_equivalent: 0,
        captured_energy: 0.0,
        residual_ratio: 0.0,
    }
}

/// The answer to a frame, right in form. `content` makes its numbers; `choice` who was counted, and what else may be.
fn answer(plan: &Plan, frame: &Outgoing, content: u8, choice: u8) -> (FrameHeader, Bytes) {
    let sent = frame.header;
    let shape = RoundShape::new(plan, sent.bucket, frame.shard, sent.update);
    let ends = shape.phase_of(sent.kind) + 1 == shape.phases().len();
    let other = choice >> 4;
    let kind = match sent.kind {
        _ if other >= 12 && ends && shape.changes_estimates => FrameKind::Restore,
        FrameKind::Sketch => FrameKind::Selection,
        FrameKind::Values => FrameKind::Mean,
        FrameKind::Sparse => FrameKind::SparseMean,
        FrameKind::Estimates => FrameKind::EstimatesMean,
        _ => FrameKind::DenseMean,
    };
    let mut counted = ranks(choice);
    let empty = sent.flags.absent || sent.flags.non_finite;
    if empty && content != 255 {
        counted.retain(|rank| *rank != ME);
    }
    let non_finite = other == 15 && kind != FrameKind::Restore;
    let (mut out, mut roster) = (Vec::new(), Vec::new());
    if !non_finite {
        roster = encode_roster(&counted.into_iter().collect());
        out = body(&shape, kind, content);
        out.extend_from_slice(&roster);
    }
    let header = FrameHeader {
        kind,
        flags: FrameFlags {
            non_finite,
            // Of another worker, perhaps: the roster alone says who was counted.
            counted: content & 2 == 2,
            ..FrameFlags::default()
        },
        body_bytes: out.len() as u32,
        roster_bytes: roster.len() as u16,
        lead: if other == 11 { content.into() } else { 0 },
        ..sent
    };
    (header, out.into())
}

/// A body of the right form: the first or the last rows of each segment, and one value throughout.
fn body(shape: &RoundShape, kind: FrameKind, content: u8) -> Vec<u8> {
    let values = |bytes: usize| {
        let value = (f32::from(content) / 16.0).to_le_bytes();
        value.into_iter().cycle().take(bytes)
    };
    let dense = |bytes: &mut Vec<u8>| {
        for segment in &shape.dense {
            bytes.extend(values(shape.codec_dense.encoded_bytes(segment.elements())));
        }
    };
    let mut out = Vec::new();
    match kind {
        FrameKind::Restore => {}
        FrameKind::Mean => {
            out.extend(values(
                shape.values_layout(&shape.keep(), Direction::Down).bytes,
            ));
        }
        FrameKind::Selection | FrameKind::SparseMean => {
            for segment in &shape.sparse {
                let first = if content & 1 == 1 {
                    segment.rows - segment.keep
                } else {
                    0
                };
                let rows = first..first + segment.keep;
                let rows: Vec<u32> = rows.map(|row| row as u32).collect();
                append_selection(segment.rows, &rows, &mut out);
                if kind == FrameKind::SparseMean {
                    let codec = shape.codec_values(Direction::Down);
                    out.extend(values(codec.encoded_bytes(rows.len() * segment.width)));
                }
            }
            dense(&mut out);
        }
        _ => out.extend(values(shape.dense_layout().bytes)),
    }
    out
}
