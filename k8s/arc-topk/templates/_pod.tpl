{{/* Certificates as `--certs` takes them: (dict "root" $ "role" "shard"). A secret's volume is replaced whole, so rotation just happens. */}}
{{- define "arc-topk.certsVolume" -}}
{{- $secret := include "arc-topk.certs.secret" . | fromYaml }}
- name: certs
  secret:
    secretName: {{ $secret.name }}
    # Readable by the group of the pod, which fsGroup sets.
    defaultMode: 0440
    items:
      - key: {{ $secret.ca }}
        path: ca.pem
      - key: {{ $secret.cert }}
        path: cert.pem
      - key: {{ $secret.key }}
        path: key.pem
{{- end }}

{{/* Spread constraints with a selector put in where none is: (dict "root" $ "component" … "pool" … "constraints" list). */}}
{{- define "arc-topk.spread" -}}
{{- range .constraints }}
{{- $constraint := deepCopy . }}
{{- if not $constraint.labelSelector }}
{{- $_ := set $constraint "labelSelector" (dict "matchLabels" (include "arc-topk.selector" $ | fromYaml)) }}
{{- end }}
{{- list $constraint | toYaml | nindent 0 }}
{{- end }}
{{- end }}

{{/* Fields of a pod that shards and pools share: (dict "root" $ "settings" map "serviceAccountName" name). */}}
{{- define "arc-topk.podCommon" -}}
serviceAccountName: {{ .serviceAccountName }}
automountServiceAccountToken: false
# Kubernetes' variables for services start like ours if the release is called arc.
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings }}
{{- if .hostNetwork }}
hostNetwork: true
dnsPolicy: ClusterFirstWithHostNet
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .schedulerName }}
schedulerName: {{ . }}
{{- end }}
{{- with .podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .initContainers }}
initContainers:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}
