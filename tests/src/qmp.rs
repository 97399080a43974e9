//! QEMU's control protocol, as far as a lab needs it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// A connection to one QEMU.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    /// Over a connection that QEMU has just made or accepted.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        let mut qmp = Self { writer: stream.try_clone()?, reader: BufReader::new(stream) };
        qmp.next().context("QEMU's greeting")?;
        qmp.run("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn next(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU has ended");
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Runs one command and returns its result.
    pub fn run(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut request = json!({ "execute": command, "arguments": arguments }).to_string();
        request.push('\n');
        self.writer.write_all(request.as_bytes()).with_context(|| format!("QMP {command}"))?;
        loop {
            let mut answer = self.next().with_context(|| format!("QMP {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QMP {command}: {}", error["desc"].as_str().unwrap_or("failed"));
            }
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            // Anything else is an event.
        }
    }

    /// Waits until a migration has completed.
    pub fn wait_for_migration(&mut self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let status = self.run("query-migrate", &json!({}))?;
            match status["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed") => bail!("The state cannot be moved: {}", status["error-desc"]),
                _ if Instant::now() > deadline => {
                    bail!("The state was not moved within {} s", patience.as_secs())
                }
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}
