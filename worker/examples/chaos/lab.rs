//! Where the processes live: each in a network namespace with an address of its own, or all on loopback.
//!
//! All namespaces, the one that holds the bridge too, bear this process's number. Links are cut at the receiver's firewall:
//! a rule at the sender would be reported to it, and a broken network reports nothing.

use super::AnyError;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};

const PREFIX: &str = "arc-chaos-";

pub(crate) struct Lab {
    /// Namespaces by slot; none on loopback.
    hosts: Vec<String>,
    switch: String,
    description: String,
}

impl Lab {
    /// All on loopback, where no link can be cut.
    pub(crate) fn loopback() -> Self {
        Self {
            hosts: Vec::new(),
            switch: String::new(),
            description: "all processes on loopback".to_owned(),
        }
    }

    /// A namespace for each slot, if they can be had.
    pub(crate) fn build(
        slots: usize,
        loss_per_mille: u32,
        loopback: bool,
    ) -> Result<Self, AnyError> {
        remove_stale();
        if loopback {
            return Ok(Self::loopback());
        }
        let mut lab = Self::loopback();
        lab.switch = format!("{PREFIX}{}-switch", std::process::id());
        match lab.make(slots, loss_per_mille) {
            Ok(()) => {
                lab.description = format!(
                    "every process in a network namespace of its own, {} % of all packets lost",
                    f64::from(loss_per_mille) / 10.0
                );
                Ok(lab)
            }
            Err(error) => {
                drop(lab);
                let mut lab = Self::loopback();
                lab.description = format!(
                    "all processes on loopback, where no link is cut and no packet lost ({error})"
                );
                Ok(lab)
            }
        }
    }

    fn make(&mut self, slots: usize, loss_per_mille: u32) -> Result<(), AnyError> {
        command_line(&format!("ip netns add {}", self.switch))?;
        self.switch_do("ip link add hub type bridge")?;
        self.switch_do("ip link set hub up")?;
        for slot in 0..slots {
            let host = format!("{PREFIX}{}-{slot}", std::process::id());
            command_line(&format!("ip netns add {host}"))?;
            self.hosts.push(host.clone());
            let address = self.address(slot);
            self.switch_do(&format!(
                "ip link add port{slot} type veth peer name eth0 netns {host}"
            ))?;
            self.switch_do(&format!("ip link set port{slot} master hub up"))?;
            for command in [
                "ip link set lo up".to_owned(),
                format!("ip address add {address}/16 dev eth0"),
                "ip link set eth0 up".to_owned(),
                "nft add table ip chaos".to_owned(),
                "nft add chain ip chaos in { type filter hook input priority 0 ; }".to_owned(),
                "nft add chain ip chaos cut".to_owned(),
                "nft add rule ip chaos in jump cut".to_owned(),
            ] {
                self.host_do(slot, &command)?;
            }
            if loss_per_mille > 0 {
                let rule = format!(
                    "nft add rule ip chaos in iifname eth0 numgen random mod 1000 < {loss_per_mille} drop"
                );
                self.host_do(slot, &rule)?;
            }
        }
        Ok(())
    }

    pub(crate) fn description(&self) -> &str {
        &self.description
    }

    pub(crate) fn can_cut(&self) -> bool {
        !self.hosts.is_empty()
    }

    /// The address of a slot's process.
    pub(crate) fn address(&self, slot: usize) -> IpAddr {
        if self.hosts.is_empty() {
            return Ipv4Addr::LOCALHOST.into();
        }
        let last = u8::try_from(slot + 1).unwrap_or(u8::MAX);
        Ipv4Addr::new(10, 213, 0, last).into()
    }

    /// `program` as a process of `slot`. `ip netns exec` becomes it, so that the child's number is its own.
    pub(crate) fn command(&self, slot: usize, program: &std::path::Path) -> Command {
        let Some(host) = self.hosts.get(slot) else {
            return Command::new(program);
        };
        let mut command = Command::new("ip");
        command.args(["netns", "exec", host]).arg(program);
        command
    }

    /// From here on nothing passes between the two.
    pub(crate) fn cut(&self, one: usize, other: usize) -> Result<(), AnyError> {
        for (at, from) in [(one, other), (other, one)] {
            let from = self.address(from);
            self.host_do(
                at,
                &format!("nft add rule ip chaos cut ip saddr {from} drop"),
            )?;
        }
        Ok(())
    }

    /// All links are whole again.
    pub(crate) fn mend(&self) -> Result<(), AnyError> {
        (0..self.hosts.len())
            .try_for_each(|slot| self.host_do(slot, "nft flush chain ip chaos cut"))
    }

    fn switch_do(&self, command: &str) -> Result<(), AnyError> {
        command_line(&format!("ip netns exec {} {command}", self.switch))
    }

    fn host_do(&self, slot: usize, command: &str) -> Result<(), AnyError> {
        command_line(&format!("ip netns exec {} {command}", self.hosts[slot]))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in self.hosts.iter().chain([&self.switch]) {
            if !name.is_empty() {
                let _gone = command_line(&format!("ip netns del {name}"));
            }
        }
    }
}

/// Namespaces of runs of this program that are no more.
fn remove_stale() {
    let listed = Command::new("ip")
        .args(["netns", "list"])
        .stderr(Stdio::null())
        .output();
    let Ok(listed) = listed else { return };
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        let owner = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !std::path::Path::new("/proc").join(pid).exists()) {
            let _gone = command_line(&format!("ip netns del {name}"));
        }
    }
}

/// Runs a command; its words are separated by blanks.
fn command_line(command: &str) -> Result<(), AnyError> {
    let mut words = command.split_whitespace();
    let program = words.next().unwrap_or_default();
    let out = Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .output();
    let out = out.map_err(|error| format!("`{command}`: {error}"))?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr).trim().to_owned();
        return Err(format!("`{command}`: {said}").into());
    }
    Ok(())
}
